"""The MLPs of the zoo: plain, gated, gated with two input projections. They work token by token."""

import torch
from torch import Tensor, nn

from revit_kernels.modules.linear import activation_name, is_plain, linear, linear_gated, linear_then, traced
from revit_kernels.modules.script import refuse_script

ROWS = 1024  # tokens that an MLP takes at a time on a CPU where nothing is recorded


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def __init__(self, inplace: bool = False):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """fc1, activation, optional norm, fc2. x: (..., in_features)"""

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        act_layer=nn.GELU,
        norm_layer=None,
        bias=True,
        drop=0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **kwargs)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features, **kwargs) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, **kwargs)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if traced(x):
            return self._forward(x)
        rows = x.numel() // x.shape[-1]
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if recorded or type(rows) is not int or x.device.type != "cpu" or rows <= 2 * ROWS or not self._is_plain():
            return self._forward(x)
        parts = x.reshape(rows, -1).split(ROWS)  # the hidden layer of all tokens is the largest thing there would be
        return torch.cat([self._forward(part) for part in parts]).view(*x.shape[:-1], -1)

    def _is_plain(self) -> bool:
        linears = is_plain(self.fc1, "Linear") and is_plain(self.fc2, "Linear")
        drops = is_plain(self.drop1, "Dropout", "Identity") and is_plain(self.drop2, "Dropout", "Identity")
        return (
            linears
            and drops
            and is_plain(self.norm, "Identity", "LayerNorm", "RmsNorm")
            and is_plain(self.act, "GELU", "GELUTanh")
        )

    def _quantizes_between(self) -> bool:
        """Whether fc1 may hand its result to fc2 in e4m3: nothing stands between them, and nobody watches."""
        layers = is_plain(self.fc1, "Fp8Linear") and is_plain(self.fc2, "Fp8Linear") and self.fc1.quantizes_groups
        nothing = is_plain(self.norm, "Identity") and is_plain(self.drop1, "Dropout") and not self.drop1.training
        return layers and nothing and activation_name(self.act) is not None

    def _forward(self, x: Tensor) -> Tensor:
        if self._quantizes_between():
            return self.drop2(self.fc2(self.fc1(x, activation_name(self.act), quantized=True)))
        x = self.norm(self.drop1(linear_then(self.fc1, self.act, x)))
        return self.drop2(linear(self.fc2, x))


class GluMlp(nn.Module):
    """One projection to two halves, of which one gates the other; SwiGLUPacked with SiLU and gate_last=False."""

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        act_layer=nn.Sigmoid,
        norm_layer=None,
        bias=True,
        drop=0.0,
        gate_last=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        if hidden_features % 2:
            raise ValueError(f"hidden_features must be even, got {hidden_features}")
        self.gate_last = gate_last
        self.chunk_dim = -1
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **kwargs)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features // 2, **kwargs) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features // 2, out_features or in_features, bias=bias, **kwargs)
        self.drop2 = nn.Dropout(drop)

    def init_weights(self) -> None:
        """Start with the gate open: its weights near zero, its bias one."""
        half = self.fc1.weight.shape[0] // 2
        nn.init.normal_(self.fc1.weight[half:], std=1e-6)
        if self.fc1.bias is not None:
            nn.init.ones_(self.fc1.bias[half:])

    def forward(self, x: Tensor) -> Tensor:
        x = linear_gated(self.fc1, self.act, x, "last" if self.gate_last else "first")
        return self.drop2(linear(self.fc2, self.norm(self.drop1(x))))


class SwiGLU(nn.Module):
    """Two projections, of which one gates the other (Shazeer, arXiv:2002.05202)."""

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        act_layer=nn.SiLU,
        norm_layer=None,
        bias=True,
        drop=0.0,
        align_to=0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        if align_to:
            hidden_features += -hidden_features % align_to
        self.fc1_g = nn.Linear(in_features, hidden_features, bias=bias, **kwargs)
        self.fc1_x = nn.Linear(in_features, hidden_features, bias=bias, **kwargs)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features, **kwargs) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, **kwargs)
        self.drop2 = nn.Dropout(drop)

    def init_weights(self) -> None:
        """Start with the gate open: its weights near zero, its bias one."""
        nn.init.normal_(self.fc1_g.weight, std=1e-6)
        if self.fc1_g.bias is not None:
            nn.init.ones_(self.fc1_g.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = linear_then(self.fc1_g, self.act, x) * linear(self.fc1_x, x)
        return self.drop2(linear(self.fc2, self.norm(self.drop1(x))))
