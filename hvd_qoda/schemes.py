"""The names of the schemes, and the exchange of each."""

from collections.abc import Mapping

from hvd_qoda.coded_all_gather import CodedAllGatherExchange, check_not_coded, is_coded
from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.exchange import AllGatherExchange, Exchange, ReduceScatterExchange, exchange_by_bytes
from hvd_qoda.hierarchical import HierarchicalExchange
from hvd_qoda.hosts import Hosts
from hvd_qoda.transport import Transport
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan
from qoda_kernels.worker_threads import WorkerThreads

__all__ = ["make_exchange"]


def make_exchange(
    scheme: str,
    plan: MessagePlan,
    codebooks: Mapping[str, Codebook],
    transport: Transport,
    name: str,
    threads: WorkerThreads | None = None,
    hosts: Hosts | None = None,
) -> Exchange:
    """Exchange of a plan by a scheme.

    Args:
        scheme: "allgather", "reduce_scatter", "hierarchical", or "by_bytes" for `exchange_by_bytes`.
        plan: layout of the tensors.
        codebooks: codebooks of the plan's keys.
        transport: the ranks.
        name: of its collectives.
        threads: what runs the codec; by default the calling thread.
        hosts: where the ranks run; needed for "hierarchical".

    Raises:
        ConfigError: for another scheme, or one that does not send the messages of codebooks with an entropy code.
        UnsupportedError: for "hierarchical" where hosts have unequal numbers of ranks, or are not known.
    """
    if scheme == "by_bytes":
        scheme = exchange_by_bytes(plan, codebooks, transport.size)
    if scheme == "allgather" and is_coded(plan, codebooks):
        return CodedAllGatherExchange(plan, codebooks, transport, name, threads)
    check_not_coded(scheme, plan, codebooks)
    if scheme == "allgather":
        return AllGatherExchange(plan, codebooks, transport, name, threads)
    if scheme == "reduce_scatter":
        return ReduceScatterExchange(plan, codebooks, transport, name, threads)
    if scheme == "hierarchical":
        if hosts is None:
            raise UnsupportedError(
                "exchange='hierarchical' needs to know which ranks share a host, which this front end does not tell; "
                "use 'allgather', 'reduce_scatter' or 'by_bytes'"
            )
        return HierarchicalExchange(plan, codebooks, transport, name, hosts, threads)
    raise ConfigError(f"exchange must be allgather, reduce_scatter, hierarchical or by_bytes; got {scheme!r}")
