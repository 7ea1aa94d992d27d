import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from qoda_kernels.errors import RegistryError
from qoda_kernels.layer_types import LAYER_TYPES, layer_types, layer_types_of_named_parameters


def named(**modules):
    """A module of no known class that holds the given modules under the given names, in order."""
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return holder


class Conv1D(nn.Module):
    """The transformers library's Conv1D: a linear layer whose weight is transposed."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class LlamaRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class VocabParallelEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 8))


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 24)


class ResidualAttentionBlock(nn.Module):
    """CLIP's block: its class name says attention, but half of it is a feed-forward layer."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.mlp = named(c_fc=nn.Linear(8, 32), c_proj=nn.Linear(32, 8))


def bert():
    def layer():
        return named(
            attention=named(
                self=named(query=nn.Linear(8, 8), key=nn.Linear(8, 8), value=nn.Linear(8, 8)),
                output=named(dense=nn.Linear(8, 8), LayerNorm=nn.LayerNorm(8)),
            ),
            intermediate=named(dense=nn.Linear(8, 32)),
            output=named(dense=nn.Linear(32, 8), LayerNorm=nn.LayerNorm(8)),
        )

    embeddings = named(
        word_embeddings=nn.Embedding(16, 8), position_embeddings=nn.Embedding(4, 8), LayerNorm=nn.LayerNorm(8)
    )
    body = named(
        embeddings=embeddings,
        encoder=named(layer=nn.ModuleList([layer(), layer()])),
        pooler=named(dense=nn.Linear(8, 8)),
    )
    return named(bert=body, classifier=nn.Linear(8, 2))


BERT_TYPES = {
    "bert.embeddings.word_embeddings.weight": "embedding",
    "bert.embeddings.position_embeddings.weight": "embedding",
    "bert.embeddings.LayerNorm.weight": "norm",
    "bert.embeddings.LayerNorm.bias": "bias",
    "bert.encoder.layer.0.attention.self.query.weight": "attention",
    "bert.encoder.layer.1.attention.self.value.weight": "attention",
    "bert.encoder.layer.0.attention.self.key.bias": "bias",
    "bert.encoder.layer.0.attention.output.dense.weight": "attention",
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": "norm",
    "bert.encoder.layer.0.intermediate.dense.weight": "feed_forward",
    "bert.encoder.layer.1.output.dense.weight": "feed_forward",
    "bert.pooler.dense.weight": "feed_forward",
    "classifier.weight": "output",
    "classifier.bias": "bias",
}


def gpt2():
    block = named(
        ln_1=nn.LayerNorm(8),
        attn=named(c_attn=Conv1D(24, 8), c_proj=Conv1D(8, 8)),
        ln_2=nn.LayerNorm(8),
        mlp=named(c_fc=Conv1D(32, 8), c_proj=Conv1D(8, 32)),
    )
    transformer = named(wte=nn.Embedding(16, 8), wpe=nn.Embedding(4, 8), h=nn.ModuleList([block]), ln_f=nn.LayerNorm(8))
    model = named(transformer=transformer, lm_head=nn.Linear(8, 16, bias=False))
    model.lm_head.weight = model.transformer.wte.weight
    return model


GPT2_TYPES = {
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "transformer.h.0.ln_1.weight": "norm",
    "transformer.h.0.attn.c_attn.weight": "attention",
    "transformer.h.0.attn.c_proj.weight": "attention",
    "transformer.h.0.attn.c_proj.bias": "bias",
    "transformer.h.0.mlp.c_fc.weight": "feed_forward",
    "transformer.h.0.mlp.c_proj.weight": "feed_forward",
}


def llama():
    def layer():
        return named(
            self_attn=named(
                q_proj=nn.Linear(8, 8, bias=False),
                k_proj=nn.Linear(8, 4, bias=False),
                v_proj=nn.Linear(8, 4, bias=False),
                o_proj=nn.Linear(8, 8, bias=False),
            ),
            mlp=named(gate_proj=nn.Linear(8, 16), up_proj=nn.Linear(8, 16), down_proj=nn.Linear(16, 8)),
            input_layernorm=LlamaRMSNorm(8),
            post_attention_layernorm=LlamaRMSNorm(8),
        )

    body = named(embed_tokens=nn.Embedding(16, 8), layers=nn.ModuleList([layer(), layer()]), norm=LlamaRMSNorm(8))
    return named(model=body, lm_head=nn.Linear(8, 16, bias=False))


LLAMA_TYPES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.self_attn.q_proj.weight": "attention",
    "model.layers.1.self_attn.o_proj.weight": "attention",
    "model.layers.1.mlp.down_proj.weight": "feed_forward",
    "model.layers.0.post_attention_layernorm.weight": "norm",
    "model.norm.weight": "norm",
    "lm_head.weight": "output",
}


def vision_transformer():
    model = named(
        patch_embed=named(proj=nn.Conv2d(3, 8, 4)),
        blocks=nn.ModuleList(
            [named(attn=named(qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8)), mlp=named(fc1=nn.Linear(8, 32)))]
        ),
        head=nn.Linear(8, 10),
    )
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
    model.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
    model.logit_scale = nn.Parameter(torch.tensor(1.0))
    model.blocks[0].attn.relative_position_bias_table = nn.Parameter(torch.zeros(49, 2))
    model.blocks[0].gamma = nn.Parameter(torch.ones(8))
    return model


VISION_TRANSFORMER_TYPES = {
    "cls_token": "embedding",
    "pos_embed": "embedding",
    "logit_scale": "other",
    "patch_embed.proj.weight": "convolution",
    "blocks.0.attn.qkv.weight": "attention",
    "blocks.0.attn.proj.weight": "attention",
    "blocks.0.attn.relative_position_bias_table": "attention",
    "blocks.0.gamma": "other",
    "blocks.0.mlp.fc1.weight": "feed_forward",
    "head.weight": "output",
}


def residual_network():
    block = named(
        conv1=nn.Conv2d(4, 4, 3),
        bn1=nn.BatchNorm2d(4),
        downsample=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    )
    return named(conv1=nn.Conv2d(3, 4, 7), layer1=nn.Sequential(block), fc=nn.Linear(4, 10))


RESIDUAL_NETWORK_TYPES = {
    "conv1.weight": "convolution",
    "layer1.0.bn1.weight": "norm",
    "layer1.0.bn1.bias": "bias",
    "layer1.0.downsample.0.weight": "convolution",
    "layer1.0.downsample.1.weight": "norm",
    "fc.weight": "output",
    "fc.bias": "bias",
}


def language_model():
    model = named(embedding=nn.EmbeddingBag(16, 8), rnn=nn.LSTM(8, 8, proj_size=4), cell=nn.GRUCell(4, 4))
    model.add_module("decoder", nn.Linear(4, 16))
    return model


LANGUAGE_MODEL_TYPES = {
    "embedding.weight": "embedding",
    "rnn.weight_ih_l0": "recurrent",
    "rnn.weight_hr_l0": "recurrent",
    "rnn.bias_hh_l0": "bias",
    "cell.weight_hh": "recurrent",
    "cell.bias_ih": "bias",
    "decoder.weight": "output",
}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (bert, BERT_TYPES),
        (gpt2, GPT2_TYPES),
        (llama, LLAMA_TYPES),
        (vision_transformer, VISION_TRANSFORMER_TYPES),
        (residual_network, RESIDUAL_NETWORK_TYPES),
        (language_model, LANGUAGE_MODEL_TYPES),
    ],
)
def test_well_known_models(build, expected):
    model = build()
    types = layer_types(model)
    assert list(types) == [name for name, _ in model.named_parameters()]
    assert {name: types[name] for name in expected} == expected
    assert set(types.values()) <= set(LAYER_TYPES)


def test_tied_output_is_an_embedding_and_nothing_takes_its_place():
    types = layer_types(gpt2())
    assert "lm_head.weight" not in types
    assert "output" not in types.values()


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.SyncBatchNorm(4),
    ],
)
def test_every_norm(module):
    assert layer_types(nn.Sequential(module))["0.weight"] == "norm"


@pytest.mark.parametrize(
    "module", [nn.Conv1d(2, 2, 3), nn.Conv3d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3)]
)
def test_every_convolution(module):
    assert layer_types(nn.Sequential(module))["0.weight"] == "convolution"


def test_multihead_attention_with_separate_projections():
    types = layer_types(nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True))
    assert types == {
        "q_proj_weight": "attention",
        "k_proj_weight": "attention",
        "v_proj_weight": "attention",
        "in_proj_bias": "bias",
        "bias_k": "attention",
        "bias_v": "attention",
        "out_proj.weight": "attention",
        "out_proj.bias": "bias",
    }


def test_torch_transformer_layers_and_no_output_in_a_row_of_equal_blocks():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    types = layer_types(nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False))
    assert types["layers.0.self_attn.in_proj_weight"] == "attention"
    assert types["layers.0.linear1.weight"] == "feed_forward"
    assert types["layers.1.linear2.weight"] == "feed_forward"
    assert types["layers.1.norm2.weight"] == "norm"


def test_nearest_enclosing_module_decides_between_attention_and_feed_forward():
    types = layer_types(named(block=ResidualAttentionBlock(), attend=CausalSelfAttention(), top=nn.Linear(8, 8)))
    assert types["block.attn.in_proj_weight"] == "attention"
    assert types["block.mlp.c_proj.weight"] == "feed_forward"
    assert types["attend.mix.weight"] == "attention"
    inside = named(
        attention_stack=named(mlp=nn.Linear(8, 8)), expert_stack=named(attn=nn.Linear(8, 8)), top=nn.Linear(8, 2)
    )
    types = layer_types(inside)
    assert types["attention_stack.mlp.weight"] == "feed_forward"
    assert types["expert_stack.attn.weight"] == "attention"


def test_last_linear_of_plain_sequential_is_output_also_when_nested():
    assert layer_types(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))) == {
        "0.weight": "feed_forward",
        "0.bias": "bias",
        "2.weight": "output",
        "2.bias": "bias",
    }
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 2)))
    assert layer_types(nested)["1.0.weight"] == "output"


def test_named_head_need_not_be_last():
    types = layer_types(named(classifier=nn.Linear(8, 2), body=nn.Linear(8, 8), attn=CausalSelfAttention()))
    assert types["classifier.weight"] == "output"
    assert types["body.weight"] == "feed_forward"


def test_adaptive_softmax_is_output():
    types = layer_types(named(softmax=nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], div_value=2.0)))
    assert set(types.values()) == {"output"}


def test_weight_norm_belongs_to_the_module_it_parametrizes():
    types = layer_types(nn.Sequential(weight_norm(nn.Conv1d(2, 2, 3)), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)))
    assert types["0.parametrizations.weight.original1"] == "convolution"
    assert types["1.parametrizations.weight.original1"] == "feed_forward"
    assert types["2.weight"] == "output"


def test_parameters_held_by_custom_modules():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 8))
    model.qkv_weight = nn.Parameter(torch.zeros(8, 24))
    model.conv_kernel = nn.Parameter(torch.zeros(4, 4, 3))
    model.final_norm = nn.Parameter(torch.zeros(8))
    model.projection = nn.Parameter(torch.zeros(8, 8))
    model.mystery = nn.Parameter(torch.zeros(8, 8))
    model.table = VocabParallelEmbedding()
    model.pieces = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    assert layer_types(model) == {
        "qkv_weight": "attention",
        "conv_kernel": "convolution",
        "final_norm": "norm",
        "projection": "feed_forward",
        "mystery": "other",
        "experts.gate_up_proj": "feed_forward",
        "table.weight": "embedding",
        "pieces.0": "other",
    }


def test_model_without_parameters():
    assert layer_types(nn.ReLU()) == {}
    assert layer_types_of_named_parameters([]) == {}


def test_pure_function():
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(layer_types(model).items()) == list(layer_types(model).items())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_lazy_parameter_is_refused_by_name():
    with pytest.raises(RegistryError, match=r"'0\.weight' has no shape yet"):
        layer_types(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(RegistryError, match=r"'0\.weight' has no shape yet"):
        layer_types_of_named_parameters(nn.Sequential(nn.LazyLinear(4)).named_parameters())


@pytest.mark.parametrize("build", [bert, gpt2, llama, residual_network])
def test_names_alone_agree_with_the_model(build):
    model = build()
    by_model = layer_types(model)
    by_name = layer_types_of_named_parameters(model.named_parameters())
    # Without the model, the pair of tied parameters is not seen, so the last matrix may pass for the output layer.
    differing = {name for name in by_model if by_model[name] != by_name[name]}
    assert list(by_name) == list(by_model)
    assert differing <= {"transformer.h.0.mlp.c_proj.weight"}


def test_names_and_shapes_alone():
    pairs = [
        ("0.weight", torch.empty(4, 3, 3, 3)),
        ("1.weight", torch.empty(4)),
        ("1.bias", torch.empty(4)),
        ("lstm.weight_ih_l0", torch.empty(16, 4)),
        ("tok_embeddings.weight", torch.empty(16, 4)),
        ("5.weight", torch.empty(4, 4)),
        ("scale", torch.empty(())),
        ("7.weight", torch.empty(2, 4)),
    ]
    assert list(layer_types_of_named_parameters(iter(pairs)).items()) == [
        ("0.weight", "convolution"),
        ("1.weight", "norm"),
        ("1.bias", "bias"),
        ("lstm.weight_ih_l0", "recurrent"),
        ("tok_embeddings.weight", "embedding"),
        ("5.weight", "feed_forward"),
        ("scale", "other"),
        ("7.weight", "output"),
    ]


def test_name_given_twice_is_refused():
    with pytest.raises(RegistryError, match=r"'a\.weight' is given twice"):
        layer_types_of_named_parameters([("a.weight", torch.empty(2)), ("a.weight", torch.empty(2))])
