"""The merging methods as data: names, papers, parameters. No torch; a method's code loads on first use.

The command line and the page are drawn from these values, so a parameter is described once, here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from iteris_sd import limits
from iteris_sd.errors import UserError

_HUGE = 1e300  # whole numbers beyond what a float holds are no numbers here, and neither are infinities


@dataclass(frozen=True)
class Parameter:
    """One dial of a method.

    ``scope`` says who reads it: ``layer`` values go to ``solve`` as they are; ``concept`` values are one
    number per concept, of which ``solve`` gets those of the concepts that touch the layer; ``run`` values
    steer the calibration itself. ``low`` and ``high`` are inclusive and hold for each number. None is
    allowed where it is the default. ``relative``: one number per concept that only weighs it against the others.
    """

    name: str
    type: Literal["float", "int", "choice", "floats"]
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    scope: Literal["layer", "concept", "run"] = "layer"
    relative: bool = False

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
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_HUGE < value < _HUGE:
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
    ``merged`` also those of X̃, the merged model's inputs on the same samples; ``words`` the moments of X at each
    concept's own words alone, and as ``generic`` those of other captions in the base model. ``needs_base``: ``solve``
    also gets the layer's own weight W0 (out, in) as ``base``. ``targets``: the layers that it merges, a key of
    ``lora.TARGETS``, where no parameter of that name says so; the others are averaged.

    ``invariances`` are the changes of what is given that leave ΔW as it is, whatever the parameters (numbers per
    concept go with their concept):

    ``order`` the concepts come in another order; ``batches`` the samples come in several batches; ``device`` all of it
    is on another device; ``duplicate`` every concept is given twice; ``scaling`` ups grow by c > 0 and downs shrink by
    it; ``basis`` the inputs of the layer are rotated, X → XQ and ΔW_n → ΔW_n Q, and ΔW rotates with them.
    """

    name: str
    title: str
    description: str
    paper: str
    needs: Literal["none", "own", "merged", "words"]
    invariances: frozenset[str]
    parameters: tuple[Parameter, ...] = ()
    needs_base: bool = False
    targets: str = "all"

    @property
    def solve(self) -> Callable[..., Any]:
        """``solve(adapters, moments, **parameters) -> Solution``, of the module called as the method, loaded on first
        use."""
        return import_module(f"{__package__}.{self.name}").solve

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

    def exact(self, parameters: Mapping[str, Any]) -> bool:
        """Whether moments must be free of float32's rounding: unless every α of the validated ``parameters`` is far
        above it."""
        ridges = [parameters.get(name) for name in ("alpha", "alpha_merged")]
        given = [ridge for ridge in ridges if ridge is not None]
        return not given or min(given) < limits.ROUGH_ALPHA

    def alone(self, parameters: Mapping[str, Any], concept: int) -> float:
        """What a concept's LoRA is multiplied by where no other touches the layer, which then keeps it otherwise.

        The scale, and its own number where that is no share; a concept whose share is 0 is left out there, too.
        """
        factor = float(parameters.get("scale", 1.0))
        for dial in (dial for dial in self.parameters if dial.scope == "concept"):
            if (numbers := parameters[dial.name]) is not None:
                factor *= bool(numbers[concept]) if dial.relative else numbers[concept]
        return factor

    def scoped(self, parameters: Mapping[str, Any], scope: str) -> dict[str, Any]:
        """Those of the validated ``parameters`` whose scope is ``scope``."""
        return {p.name: parameters[p.name] for p in self.parameters if p.scope == scope}


INVARIANCES = frozenset({"order", "batches", "device", "duplicate", "scaling", "basis"})
# Entry by entry: no rotation; and the rank they are cut to grows with the number of concepts.
_ENTRYWISE = INVARIANCES - {"duplicate", "basis"}

# Dials that several methods have.
_SCALE = Parameter(
    name="scale",
    type="float",
    default=1.0,
    low=0.0,
    high=limits.MAX_WEIGHT,
    help="λ, multiplies the result.",
)
_DENSITY = Parameter(
    name="density",
    type="float",
    default=0.2,
    low=0.0,
    high=1.0,
    help="Share of each LoRA's entries that is kept, the largest ones.",
)
_MAJORITY_SIGN = Parameter(
    name="majority_sign",
    type="choice",
    default="total",
    choices=("total", "count"),
    help="Which sign an entry gets: total, that of the sum; count, that of most LoRAs.",
)
_DROP_RATE = Parameter(
    name="p",
    type="float",
    default=0.2,
    low=0.0,
    high=0.99,
    help="Share of each LoRA's entries that is dropped at random; the others grow by 1/(1 − p).",
)
_SEED = Parameter(
    name="seed",
    type="int",
    default=0,
    low=0,
    high=limits.MAX_SEED,
    help="Which entries are dropped.",
)
_RANK = Parameter(
    name="rank",
    type="int",
    default=None,
    low=1,
    high=limits.MAX_RANK,
    help="Rank that the result is cut to by SVD. Empty: the sum of the LoRAs' ranks.",
)

_FACTOR = Parameter(
    name="factor",
    type="float",
    default=0.1,
    low=0.0,
    high=1.0,
    help="Multiplies the off-diagonal entries of XᵀX; below 1 it keeps the system regular.",
)
_ALPHA = Parameter(
    name="alpha",
    type="float",
    default=1e-4,
    low=0.0,
    high=1.0,
    help="Regularisation (eq. 7): α times the moments' norm is added to their diagonals.",
)
_WEIGHTS = Parameter(
    name="weights",
    type="choice",
    default="adaptive",
    choices=("adaptive", "uniform"),
    help="adaptive: λ = ‖ΔW‖²/‖XΔWᵀ‖² (eq. 8), so no concept outshouts others; uniform: 1.",
)
_COEFFICIENTS = Parameter(
    name="coefficients",
    type="floats",
    default=None,
    low=0.0,
    high=limits.MAX_COEFFICIENT,
    scope="concept",
    relative=True,
    help="One number per concept, multiplies its λ: how much the compromise favours it; 0 leaves it out.",
)
_ITERATIONS = Parameter(
    name="iterations",
    type="int",
    default=None,
    low=0,
    high=limits.MAX_ITERATIONS,
    scope="run",
    help="Empty: one sweep to the fixed point. k: Algorithm 1 as printed, k refinements.",
)
_TOLERANCE = Parameter(
    name="tolerance",
    type="float",
    default=0.0,
    low=0.0,
    high=1.0,
    scope="run",
    help="Iterations, where a number of them is given, end early once no layer's ΔW changes by more than this share.",
)

_METHODS = (
    Method(
        name="linear",
        title="Linear",
        description="The plain average of the LoRAs' weight changes; needs no samples.",
        paper="Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482",
        needs="none",
        invariances=INVARIANCES,
    ),
    Method(
        name="task_arithmetic",
        title="Task arithmetic",
        description="The scaled sum of the LoRAs' weight changes; needs no samples.",
        paper="Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089",
        needs="none",
        invariances=INVARIANCES - {"duplicate"},
        parameters=(
            _SCALE,
            Parameter(
                name="coefficients",
                type="floats",
                default=None,
                low=-limits.MAX_WEIGHT,
                high=limits.MAX_WEIGHT,
                scope="concept",
                help="One number per concept, multiplies its weight change; below 0 it is taken away.",
            ),
        ),
    ),
    Method(
        name="normalised",
        title="Normalised linear",
        description="The average of the LoRAs' weight changes with weights that sum to 1; needs no samples.",
        paper="Wu et al., Mixture of LoRA experts, ICLR 2024, arXiv 2404.13628",
        needs="none",
        invariances=INVARIANCES,
        parameters=(
            Parameter(
                name="coefficients",
                type="floats",
                default=None,
                low=0.0,
                high=limits.MAX_COEFFICIENT,
                scope="concept",
                relative=True,
                help="One number per concept; divided by their sum they are the weights. Empty: all alike.",
            ),
        ),
    ),
    Method(
        name="ties",
        title="TIES",
        description="Keeps each LoRA's largest entries, elects a sign for each entry, and averages what agrees.",
        paper="Yadav et al., TIES-Merging: resolving interference when merging models, NeurIPS 2023, "
        "arXiv 2306.01708",
        needs="none",
        invariances=_ENTRYWISE,
        parameters=(_DENSITY, _MAJORITY_SIGN, _SCALE, _RANK),
    ),
    Method(
        name="dare_linear",
        title="DARE",
        description="Drops entries of each LoRA at random, rescales the others, and averages.",
        paper="Yu et al., Language models are Super Mario, ICML 2024, arXiv 2311.03099",
        needs="none",
        invariances=_ENTRYWISE,
        parameters=(_DROP_RATE, _SCALE, _SEED, _RANK),
    ),
    Method(
        name="dare_ties",
        title="DARE-TIES",
        description="Drops entries of each LoRA at random, rescales the others, and merges them by TIES.",
        paper="Yu et al., Language models are Super Mario, ICML 2024, arXiv 2311.03099",
        needs="none",
        invariances=_ENTRYWISE,
        parameters=(
            _DROP_RATE,
            replace(_DENSITY, default=1.0, help="Share of the entries kept after the drop; 1: all of them."),
            _MAJORITY_SIGN,
            _SCALE,
            _SEED,
            _RANK,
        ),
    ),
    Method(
        name="magnitude",
        title="Magnitude pruning",
        description="Keeps each LoRA's largest entries, and averages.",
        paper="Han et al., Learning both weights and connections, NeurIPS 2015, arXiv 1506.02626",
        needs="none",
        invariances=_ENTRYWISE,
        parameters=(_DENSITY, _SCALE, _RANK),
    ),
    Method(
        name="svd",
        title="SVD",
        description="The average of the LoRAs' weight changes, cut to a small rank.",
        paper="Eckart and Young, The approximation of one matrix by another of lower rank, 1936",
        needs="none",
        invariances=INVARIANCES - {"duplicate"},
        parameters=(
            Parameter(
                name="of",
                type="choice",
                default="average",
                choices=("average", "sum"),
                help="What is cut: the average of the weight changes, or their sum.",
            ),
            replace(_RANK, help="Rank of the result. Empty: the largest rank among the LoRAs."),
        ),
    ),
    Method(
        name="knots",
        title="KnOTS",
        description="Aligns the LoRAs in a shared basis by SVD, and merges their coordinates by TIES.",
        paper="Stoica et al., Model merging with SVD to tie the KnOTS, ICLR 2025, arXiv 2410.19735",
        needs="none",
        invariances=INVARIANCES - {"basis"},
        parameters=(
            _DENSITY,
            _MAJORITY_SIGN,
            _SCALE,
            Parameter(
                name="sigma",
                type="choice",
                default="shared",
                choices=("shared", "merged"),
                help="shared: TIES sees V, as in the paper; merged: it sees ΣV, as in the authors' code.",
            ),
        ),
    ),
    Method(
        name="tsv",
        title="TSV-Merge",
        description="Keeps each LoRA's strongest singular vectors, and makes those of different LoRAs orthogonal.",
        paper="Gargiulo et al., Task singular vectors: reducing task interference in model merging, CVPR 2025, "
        "arXiv 2412.00081",
        needs="none",
        invariances=INVARIANCES - {"duplicate"},
        parameters=(
            Parameter(
                name="share",
                type="float",
                default=None,
                low=0.0,
                high=1.0,
                help="Share of each LoRA's singular values that is kept. Empty: 1/N of them, N being the number of "
                "LoRAs.",
            ),
            _SCALE,
        ),
    ),
    Method(
        name="iso_c",
        title="Iso-C",
        description="The sum of the LoRAs' weight changes, all its singular values made equal.",
        paper="Marczak et al., No task left behind: isotropic model merging with common and task-specific "
        "subspaces, ICML 2025, arXiv 2502.04959",
        needs="none",
        invariances=INVARIANCES - {"duplicate"},
        parameters=(_SCALE,),
    ),
    Method(
        name="regmean",
        title="RegMean",
        description="Matches each LoRA's outputs on its own inputs, solved once per layer.",
        paper="Jin et al., Dataless knowledge fusion by merging weights, ICLR 2023, arXiv 2212.09849",
        needs="own",
        invariances=INVARIANCES - {"basis"},
        parameters=(_FACTOR,),
    ),
    Method(
        name="regmean_pp",
        title="RegMean++",
        description="RegMean on the inputs that the merged model itself produces, at every layer.",
        paper="Nguyen et al., RegMean++: enhancing effectiveness and generalization of regression mean for model "
        "merging, TMLR 2026, arXiv 2508.03121",
        needs="merged",
        invariances=INVARIANCES - {"basis"},
        parameters=(_FACTOR, _ITERATIONS, _TOLERANCE),
    ),
    Method(
        name="gradient_fusion",
        title="Gradient fusion",
        description="Descends RegMean's objective from the base model by L-BFGS and stops early.",
        paper="Gu et al., Mix-of-Show: decentralized low-rank adaptation for multi-concept customization of diffusion "
        "models, NeurIPS 2023, arXiv 2305.18292",
        needs="own",
        invariances=INVARIANCES,
        parameters=(
            Parameter(
                name="steps",
                type="int",
                default=50,
                low=1,
                high=1000,
                help="Steps of L-BFGS; the paper takes 50 in the U-Net and 500 in the text encoder.",
            ),
        ),
    ),
    Method(
        name="custom_diffusion",
        title="Custom Diffusion",
        description="Cross-attention K and V do to each concept's own words what its LoRA does, and little to others.",
        paper="Kumari et al., Multi-concept customization of text-to-image diffusion, CVPR 2023, arXiv 2212.04488",
        needs="words",
        invariances=INVARIANCES,
        parameters=(
            Parameter(
                name="slack",
                type="float",
                default=1e-4,
                low=1e-8,
                high=1.0,
                help="How much leaving other captions as they are counts against the concepts' own words.",
            ),
        ),
        targets="cross_attention",
    ),
    Method(
        name="ssr",
        title="SSR-Merge",
        description="Matches each LoRA's outputs on its own inputs, within the space that the LoRAs' ranks span.",
        paper="Wei et al., SSR-Merge: subspace signal routing for training-free LoRA merging in diffusion models, "
        "2026, arXiv 2606.10617",
        needs="own",
        invariances=INVARIANCES,
        parameters=(_ALPHA,),
    ),
    Method(
        name="rank_space",
        title="IterIS in rank space",
        description="IterIS within the space that the LoRAs' ranks span: a small system per layer.",
        paper="This project; after arXiv 2411.15231 and arXiv 2606.10617",
        needs="merged",
        invariances=INVARIANCES,
        parameters=(_ALPHA, _WEIGHTS, _COEFFICIENTS, _ITERATIONS, _TOLERANCE),
    ),
    Method(
        name="iteris",
        title="IterIS",
        description="Matches each LoRA's outputs given the inputs that the merged model itself produces.",
        paper="Chen et al., IterIS: iterative inference-solving alignment for LoRA merging, CVPR 2025, "
        "arXiv 2411.15231",
        needs="merged",
        invariances=INVARIANCES,
        parameters=(
            _ALPHA,
            Parameter(
                name="alpha_merged",
                type="float",
                default=None,
                low=0.0,
                high=1.0,
                help="α of the left side X̃ᵀX̃ alone, as the authors' code allows; empty: the same.",
            ),
            _WEIGHTS,
            Parameter(
                name="adaptive_on",
                type="choice",
                default="adapter",
                choices=("adapter", "full"),
                help="What λ is made of: ΔW (the paper's text), or W0 + ΔW (the authors' code).",
            ),
            Parameter(
                name="mix",
                type="float",
                default=0.0,
                low=0.0,
                high=1.0,
                help="ρ: X̃ is replaced by (1−ρ)X̃ + ρX, as the authors' code can; 1 forgets the merged model.",
            ),
            Parameter(
                name="objective",
                type="choice",
                default="adapter",
                choices=("adapter", "full"),
                help="What is matched: what ΔW adds to a layer's output (the paper), or the whole output, which also "
                "mends the drift of W0's part and is cut to a rank.",
            ),
            replace(
                _RANK, help="With objective full, the rank it is cut to. Empty: the sum of the LoRAs' ranks."
            ),
            _COEFFICIENTS,
            Parameter(
                name="absent",
                type="choice",
                default="skip",
                choices=("skip", "zero"),
                scope="run",
                help="A LoRA that does not touch a layer: skip, it takes no part there; zero, its samples speak for "
                "leaving the layer as it is.",
            ),
            Parameter(
                name="targets",
                type="choice",
                default="all",
                choices=("all", "text", "text_encoder", "cross_attention"),
                scope="run",
                help="Layers that are merged this way: all; what sees text only (the text encoder and the "
                "cross-attention's K and V); or one of these two. The others are averaged.",
            ),
            _ITERATIONS,
            _TOLERANCE,
        ),
        needs_base=True,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _METHODS}


def find(name: str) -> Method:
    """The method called ``name``. Raises UserError when there is none."""
    if name not in METHODS:
        raise UserError(f"There is no merging method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]
