"""The merging methods as data: names, papers, parameters. No torch; a method's code loads on first use.

The command line and the page are drawn from these values, so a parameter is described once, here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from iteris_sd import limits
from iteris_sd.errors import UserError


@dataclass(frozen=True)
class Parameter:
    """One dial of a method.

    ``scope`` says who reads it: ``layer`` values go to ``solve`` as they are; ``concept`` values are one
    number per concept, of which ``solve`` gets those of the concepts that touch the layer; ``run`` values
    steer the calibration itself. ``low`` and ``high`` are inclusive and hold for each number. None is
    allowed where it is the default.
    """

    name: str
    type: Literal["float", "int", "choice", "floats"]
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    scope: Literal["layer", "concept", "run"] = "layer"

    def validate(self, value: Any) -> Any:
        """``value`` as ``solve`` wants it. Raises UserError when it is of the wrong kind or out of range."""
        if value is None and self.default is None:
            return None
        if self.type == "choice":
            if value not in self.choices:
                raise UserError(f"{self.name} must be one of {', '.join(self.choices)}, not {value!r}.")
            return value
        if self.type == "floats":
            return self._numbers(value)
        return self._number(value)

    def parse(self, text: str) -> Any:
        """The value written in ``text``, as from a terminal; lists with commas. Raises UserError as ``validate``."""
        words = [word.strip() for word in text.split(",")]
        if self.default is None and text.strip().lower() in ("", "none"):
            return None
        if self.type == "choice":
            return self.validate(text.strip())
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            return self.validate(text)
        return self.validate(numbers if self.type == "floats" else numbers[0] if len(numbers) == 1 else text)

    def _number(self, value: Any) -> float | int:
        kind = "a whole number" if self.type == "int" else "a number"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{self.name} must be {kind}, not {value!r}.")
        if self.type == "int" and value != int(value):
            raise UserError(f"{self.name} must be {kind}, not {value!r}.")
        if not self.low <= value <= self.high:
            raise UserError(f"{self.name} must lie between {self.low:g} and {self.high:g}, not {value!r}.")
        return int(value) if self.type == "int" else float(value)

    def _numbers(self, value: Any) -> tuple[float, ...]:
        if not isinstance(value, list | tuple):
            raise UserError(f"{self.name} must be a list of numbers, one per concept, not {value!r}.")
        numbers = tuple(self._number(number) for number in value)
        if not any(numbers):
            raise UserError(f"{self.name} must not all be zero, got {list(numbers)}.")
        return numbers


@dataclass(frozen=True)
class Method:
    """A way of merging. ``needs`` is what its ``solve`` wants to know of the layer's inputs:

    ``none`` nothing (data-free); ``own`` the moments of X, each LoRA's inputs on its own samples;
    ``merged`` also those of X̃, the merged model's inputs on the same samples.
    """

    name: str
    title: str
    description: str
    paper: str
    needs: Literal["none", "own", "merged"]
    module: str
    parameters: tuple[Parameter, ...] = ()

    @property
    def solve(self) -> Callable[..., Any]:
        """``solve(adapters, moments, **parameters) -> Solution``, loaded on first use."""
        return import_module(self.module).solve

    def validate(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Every parameter of the method, defaults filled in. Raises UserError for bad names or values."""
        for name in parameters:
            self.parameter(name)
        return {p.name: p.validate(parameters.get(p.name, p.default)) for p in self.parameters}

    def parameter(self, name: str) -> Parameter:
        """The parameter called ``name``. Raises UserError when there is none."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        allowed = ", ".join(parameter.name for parameter in self.parameters) or "none"
        raise UserError(f"{self.title} has no parameter {name!r}; its parameters: {allowed}.")

    def scoped(self, parameters: Mapping[str, Any], scope: str) -> dict[str, Any]:
        """Those of the validated ``parameters`` whose scope is ``scope``."""
        return {p.name: parameters[p.name] for p in self.parameters if p.scope == scope}


_METHODS = (
    Method(
        name="linear",
        title="Linear",
        description="The plain average of the LoRAs' weight changes; needs no samples.",
        paper="Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482",
        needs="none",
        module="iteris_sd.merging.linear",
    ),
    Method(
        name="regmean",
        title="RegMean",
        description="Matches each LoRA's outputs on its own inputs, solved once per layer.",
        paper="Jin et al., Dataless knowledge fusion by merging weights, ICLR 2023, arXiv 2212.09849",
        needs="own",
        module="iteris_sd.merging.regmean",
        parameters=(
            Parameter(
                name="factor",
                type="float",
                default=0.1,
                low=0.0,
                high=1.0,
                help="Multiplies the off-diagonal entries of XᵀX; below 1 it keeps the system regular.",
            ),
        ),
    ),
    Method(
        name="iteris",
        title="IterIS",
        description="Matches each LoRA's outputs given the inputs that the merged model itself produces.",
        paper="Chen et al., IterIS: iterative inference-solving alignment for LoRA merging, CVPR 2025, "
        "arXiv 2411.15231",
        needs="merged",
        module="iteris_sd.merging.iteris",
        parameters=(
            Parameter(
                name="alpha",
                type="float",
                default=1e-4,
                low=0.0,
                high=1.0,
                help="Regularisation (eq. 7): α times the moments' norm is added to their diagonals.",
            ),
            Parameter(
                name="weights",
                type="choice",
                default="adaptive",
                choices=("adaptive", "uniform"),
                help="adaptive: λ = ‖ΔW‖²/‖XΔWᵀ‖² (eq. 8), so no concept outshouts others; uniform: 1.",
            ),
            Parameter(
                name="coefficients",
                type="floats",
                default=None,
                low=0.0,
                high=limits.MAX_COEFFICIENT,
                scope="concept",
                help="One number per concept, multiplies its λ: how much the compromise favours it.",
            ),
            Parameter(
                name="iterations",
                type="int",
                default=None,
                low=0,
                high=limits.MAX_ITERATIONS,
                scope="run",
                help="Empty: one sweep to the fixed point. k: Algorithm 1 as printed, k refinements.",
            ),
        ),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _METHODS}


def find(name: str) -> Method:
    """The method called ``name``. Raises UserError when there is none."""
    if name not in METHODS:
        raise UserError(f"There is no merging method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]
