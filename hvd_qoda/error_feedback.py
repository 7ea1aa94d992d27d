"""Error feedback: what a message has left out is added to the next gradient before it is encoded.

For a gradient g and the residual r kept so far (zero at first), in float32:

    corrected = g + r;   sent = decode(own message of corrected);   new r = corrected - sent

(1-bit SGD, Seide et al., 2014; PowerSGD, arXiv 1905.13727, for whose identity input = sent + residual the last line
stands). Residuals are in the unit of the gradients handed over, before the ranks' mean: averaging or summing, and
accumulation before the exchange, do not concern them. A loss scale does: call `scale` with new scale / old scale.

A gradient of 16 bits is corrected in float32 and then rounded to its dtype, which is what is encoded; the residual
holds that rounding, too. In a reduce-scatter the residual is that of the rank's own quantization, the first of two.

A step whose result is not finite on any parameter leaves no trace: loss scaling skips it on all ranks. Residuals
differ from rank to rank, and every rank saves its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvd_qoda.errors import ConfigError, QodaError, UnsupportedError
from hvd_qoda.exchange import Exchange

__all__ = ["ErrorFeedback"]

_Place = tuple[str, int]  # a parameter's name and the first coordinate of a slice of it


class ErrorFeedback:
    """This rank's residuals: one for every quantized slice of a parameter."""

    def __init__(self) -> None:
        self._residuals: dict[_Place, torch.Tensor] = {}
        self._new: dict[_Place, torch.Tensor] = {}  # of the step under way
        self._corrected: dict[_Place, torch.Tensor] = {}  # handed out and not yet kept, float32
        self._is_finite = True  # the step under way, as far as it has arrived

    def corrected(self, exchange: Exchange, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What is to be encoded in place of these gradients; they are not written.

        Args:
            exchange: that is about to be started.
            values: one contiguous 1-D tensor per segment of its plan. Exact segments are passed through.

        Raises:
            UnsupportedError: for an exchange in which a rank does not send its own gradient.
        """
        if not exchange.has_own_message:
            raise UnsupportedError(
                "error_feedback needs the message of each rank's own gradient, but this exchange adds gradients up "
                'before it quantizes them: use exchange="allgather" or "reduce_scatter"'
            )
        result = []
        for segment, tensor in zip(exchange.plan.segments, values, strict=True):
            if segment.format.is_exact:
                result.append(tensor)
                continue
            place = (segment.slice.parameter, segment.slice.start)
            residual = self._new.get(place, self._residuals.get(place))
            wide = tensor.float() if residual is None else tensor.float() + residual.to(tensor.device)
            self._corrected[place] = wide
            result.append(wide.to(tensor.dtype))
        return result

    def keep(self, exchange: Exchange, sent: Sequence[torch.Tensor]) -> None:
        """Note what was sent of the gradients that `corrected` handed out.

        Args:
            exchange: whose round has just been started.
            sent: `exchange.own_message().decode()`.

        Raises:
            QodaError: without `corrected` before.
        """
        for segment, tensor in zip(exchange.plan.segments, sent, strict=True):
            if segment.format.is_exact:
                continue
            place = (segment.slice.parameter, segment.slice.start)
            if place not in self._corrected:
                raise QodaError(f"parameter {place[0]!r} was sent without its residual: call corrected() first")
            self._new[place] = self._corrected.pop(place) - tensor

    def add_to(self, parameter: str, gradient: torch.Tensor) -> None:
        """Add a parameter's residual, in place, to a gradient that travels as it is; only rounding is left of it.

        Args:
            parameter: its name.
            gradient: dense, of any device; the whole parameter's.
        """
        for place in [place for place in self._residuals if place[0] == parameter]:
            residual = self._new.get(place, self._residuals[place]).cpu()
            part = gradient.detach().cpu().reshape(-1)[place[1] : place[1] + residual.numel()]
            wide = part.float() + residual
            rounded = wide.to(gradient.dtype)
            flat = torch.arange(place[1], place[1] + residual.numel(), device=gradient.device)
            gradient.detach().put_(flat, rounded.to(gradient.device))
            self._new[place] = wide - rounded.float()

    def arrived(self, result: torch.Tensor) -> None:
        """Look at a result of the exchanges of this step, equal on all ranks."""
        self._is_finite = self._is_finite and bool(torch.isfinite(result).all())

    def end_step(self) -> None:
        """Take over the step's residuals, if all that arrived was finite."""
        if self._is_finite:
            self._residuals.update(self._new)
        self.abandon_step()

    def abandon_step(self) -> None:
        """Forget the step under way."""
        self._new, self._corrected, self._is_finite = {}, {}, True

    def scale(self, factor: float) -> None:
        """Multiply all residuals: 0 forgets them, a factor below 1 lets them decay.

        Raises:
            ConfigError: for a factor that is not finite.
        """
        if not abs(factor) < float("inf"):
            raise ConfigError(f"residuals can only be multiplied by a finite factor; got {factor!r}")
        if factor == 0.0:
            self._residuals = {}
        for residual in self._residuals.values():
            residual.mul_(factor)

    def forget(self) -> None:
        """Start anew: all residuals are zero."""
        self.abandon_step()
        self._residuals = {}

    def residual(self, parameter: str, start: int = 0) -> torch.Tensor | None:
        """A copy of a slice's residual, float32; None where it is zero because nothing was sent yet."""
        found = self._residuals.get((parameter, start))
        return None if found is None else found.clone()

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals: a list of slices, each with its parameter, first coordinate and values (a tensor)."""
        return {
            "residuals": [
                {"parameter": parameter, "start": start, "values": values.to("cpu", copy=True)}
                for (parameter, start), values in self._residuals.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on the same rank."""
        self.forget()
        for entry in state["residuals"]:
            self._residuals[entry["parameter"], int(entry["start"])] = entry["values"].float().clone()
