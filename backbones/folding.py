"""Fold batch norms in evaluation mode into the linear layers beside them."""

from torch import Tensor, nn


def foldable(norm: nn.Module) -> bool:
    """Whether ``norm`` has running statistics; an already folded one is an Identity without."""
    return getattr(norm, "running_var", None) is not None


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode, ``(C,)`` each, float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight, shift * norm.weight
    return scale, shift if norm.bias is None else shift + norm.bias


def linear_before(linear: nn.Linear, norm: nn.Module) -> nn.Linear:
    """``norm(linear(x))`` as one linear layer."""
    scale, shift = affine(norm)
    bias = shift if linear.bias is None else linear.bias * scale + shift
    return _linear(linear, linear.weight * scale[:, None], bias)


def linear_after(norm: nn.Module, linear: nn.Linear) -> nn.Linear:
    """``linear(norm(x))`` as one linear layer."""
    scale, shift = affine(norm)
    bias = linear.weight.double() @ shift
    bias = bias if linear.bias is None else bias + linear.bias
    return _linear(linear, linear.weight * scale, bias)


def parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """``value`` as a parameter with the dtype, device and ``requires_grad`` of ``like``."""
    return nn.Parameter(value.to(like), requires_grad=like.requires_grad)


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    folded = nn.Linear(like.in_features, like.out_features, device="meta")
    folded.weight = parameter(weight, like.weight)
    folded.bias = parameter(bias, like.weight)
    return folded.eval()
