"""Who keeps which part of parameters, gradients and optimizer state: the stages of ZeRO (Rajbhandari et al. 2020).

Stage 3 shards parameters over the `fsdp` axis, and with them everything else. In stages 1 and 2 each device has all
parameters and a part of the optimizer state; in stage 2 also only its part of the gradients. The optimizer state may be
spread over more axes than the parameters: fsdp inside a node, and the state over `data` too.
"""

from __future__ import annotations

import dataclasses
import math

from paxlike.parallel.rules import DEFAULT_RULES, Rules

WIDTH = "embed"  # the dimension of parameters that is sharded
PARAMETER_AXIS = "fsdp"


@dataclasses.dataclass(frozen=True)
class Zero:
    """A stage, and the mesh axes over which the optimizer state is spread.

    Attributes:
      stage: 1, 2 or 3.
      axes: mesh axes of the optimizer state (moments and averaged parameters), and of gradients from stage 2 on.
    """

    stage: int = 3
    axes: tuple[str, ...] = (PARAMETER_AXIS,)

    def __post_init__(self):
        if self.stage not in (1, 2, 3):
            raise ValueError(f"ZERO_STAGE={self.stage} is none of 1, 2, 3")
        if len(set(self.axes)) < len(self.axes) or not self.axes:
            raise ValueError(f"ZERO_AXES={list(self.axes)} must name one or more axes, each once")
        if self.stage == 3 and PARAMETER_AXIS not in self.axes:
            raise ValueError(
                f"ZERO_AXES={list(self.axes)} leaves out fsdp, over which ZERO_STAGE=3 shards parameters; add it or "
                "use ZERO_STAGE=2"
            )

    def check(self, sizes: dict[str, int]) -> None:
        """Raises ValueError for an axis that the mesh, of these sizes, does not have, and for axes of one device."""
        if self == Zero():  # a mesh without fsdp shards nothing over it
            return
        for axis in self.axes:
            if axis not in sizes:
                raise ValueError(
                    f"ZERO_AXES={list(self.axes)}: the mesh has no axis '{axis}'; its axes are {', '.join(sizes)}"
                )

        parts = math.prod(sizes[axis] for axis in self.axes)
        if self.stage < 3 and parts == 1 < math.prod(sizes.values()):
            shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
            raise ValueError(
                f"ZERO_STAGE={self.stage} has no effect: ZERO_AXES={list(self.axes)} are one device on {shape}; "
                "name an axis that is larger"
            )

    def parameter_rules(self, rules: Rules | None) -> Rules:
        """The rules of parameters and activations."""
        rules = DEFAULT_RULES if rules is None else rules
        return rules if self.stage == 3 else {**rules, WIDTH: None}

    def state_rules(self, rules: Rules | None) -> Rules:
        """The rules of the optimizer state."""
        rules = DEFAULT_RULES if rules is None else rules
        own = rules.get(WIDTH)
        own = () if own is None else (own,) if isinstance(own, str) else tuple(own)
        # The parameters' axes come first: a device's part of the state lies then inside its part of the parameters.
        held = tuple(axis for axis in own if axis != PARAMETER_AXIS or axis in self.axes)
        return {**rules, WIDTH: (*held, *(axis for axis in self.axes if axis not in held))}

    def gradient_rules(self, rules: Rules | None) -> Rules:
        """The rules of gradients: those of the parameters in stage 1, else of the state."""
        return self.parameter_rules(rules) if self.stage == 1 else self.state_rules(rules)
