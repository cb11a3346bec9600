"""What an adapter means at a layer of a model: a linear one, or a convolution seen as a linear one.

| layer                  | its inputs as rows                 | ΔW             | down as stored            |
|------------------------|------------------------------------|----------------|---------------------------|
| ``nn.Linear``          | x, (…, in)                         | (out, in)      | (r, in)                   |
| ``nn.Conv2d`` (kh, kw) | patches of x, (n, places, c·kh·kw) | (out, c·kh·kw) | (r, c, kh, kw), flattened |

A convolution is the linear layer of its unfolded inputs, so every method of merging serves it as it is.
"""

from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from iteris_sd.errors import UserError
from iteris_sd.lora import LoRA, LowRank


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs that a layer's weight meets, (n, …, in), of its input x."""
    if not isinstance(layer, nn.Conv2d):
        return x
    patches = F.unfold(x, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
    return patches.transpose(1, 2)


def geometry(layer: nn.Module) -> Hashable:
    """What beside the tensor itself decides a layer's ``rows``: equal for layers that may share moments."""
    if not isinstance(layer, nn.Conv2d):
        return None
    return layer.kernel_size, layer.dilation, _padding(layer), layer.stride


def applied(layer: nn.Module, adapter: LowRank, x: Tensor) -> Tensor:
    """What an adapter, on the device and in the dtype of a layer's input x, adds to its output."""
    if not isinstance(layer, nn.Conv2d):
        return adapter.apply(x)
    down = adapter.down.unflatten(1, (layer.in_channels, *layer.kernel_size))
    inner = F.conv2d(x, down, None, layer.stride, _padding(layer), layer.dilation)
    return F.conv2d(inner, adapter.up[:, :, None, None])


def added(
    layer: nn.Module, x: Tensor, output: Tensor, adapters: Sequence[LowRank | None], rows: int
) -> Tensor:
    """A layer's output with what adapters add: one to all rows, or several in turn to blocks of `rows` rows."""
    if len(adapters) == 1 and adapters[0] is not None:
        return output + applied(layer, adapters[0], x)
    if len(adapters) < 2:
        return output
    parts, sums = (t.unflatten(0, (-1, len(adapters), rows)) for t in (x, output))
    for k, adapter in enumerate(adapters):
        if adapter is not None:
            sums[:, k] += applied(layer, adapter, parts[:, k].flatten(0, 1)).unflatten(0, (-1, rows))
    return output


def weight(layer: nn.Module) -> Tensor:
    """A layer's own weight W0, (out, in)."""
    return layer.get_parameter("weight").detach().flatten(1)


def check_fit(lora: LoRA, layers: Mapping[str, nn.Module], whose: str) -> None:
    """Raise UserError when a LoRA touches a layer that is not there, cannot be adapted, or has another shape."""
    for name, adapter in lora.items():
        layer = layers.get(name)
        if layer is None:
            raise UserError(
                f"{whose} touches {name}, which this model does not have; it is for another model."
            )
        if not _adaptable(layer):
            raise UserError(
                f"{whose} touches {name}, a {type(layer).__name__}; only linear layers and plain convolutions can be "
                "merged. Leave the layer out when training."
            )
        wanted = tuple(weight(layer).shape)
        if adapter.shape != wanted:
            raise UserError(
                f"{whose} does not fit {name}: it is {adapter.shape[0]} × {adapter.shape[1]} and the layer "
                f"{wanted[0]} × {wanted[1]}; it is for another model."
            )
        kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else (1, 1)
        if lora.kernels.get(name, (1, 1)) != kernel:
            raise UserError(
                f"{whose} does not fit {name}: it is for a kernel of {lora.kernels.get(name, (1, 1))} and the layer "
                f"has {kernel}; it is for another model."
            )


def _adaptable(layer: nn.Module) -> bool:
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear) or (plain and not isinstance(layer.padding, str))


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """The padding of a convolution that ``_adaptable`` let through."""
    assert not isinstance(layer.padding, str)
    return layer.padding
