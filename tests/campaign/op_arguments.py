"""Small arguments that fit together: of kernels on a CPU, of torch ops, and of the public functions of the ops."""

import random

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from revit_kernels import dispatch, native, ops
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.ops.block import ACTIVATIONS, BlockWeights
from revit_kernels.ops.linear import ACTIVATIONS as EPILOGUES
from revit_kernels.ops.linear import GATES
from revit_kernels.ops.linear.fp8 import quantize
from revit_kernels.ops.linear.panels import has_kernel
from revit_kernels.ops.patch_embed import listed as listed  # registers its torch ops
from revit_kernels.ops.pool import KINDS
from revit_kernels.packing import Packing

KERNELS, TORCH_OPS, CALLS = {}, {}, {}  # by name: what makes the arguments


def prepare():
    native.load("cpu")
    for name in dispatch.OPS:
        dispatch.load(name, "cpu")


def torch_op(function):
    TORCH_OPS[function.__name__] = function
    return function


def kernel(function):
    KERNELS[function.__name__] = function
    return function


def public(function):
    CALLS[function.__name__] = function
    return function


class Making:
    """Small arguments that fit together, of one seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice((torch.float32, torch.bfloat16))
        self.lengths = [self.random.choice((0, 1, 2, 5, 9, 17, 33)) for _ in range(self.random.randrange(5))]
        self.tail = self.random.choice((0, 0, 1, 4))
        self.tokens = sum(self.lengths) + self.tail

    def normal(self, *shape, dtype=None):
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def cu_seqlens(self):
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def rows(self, count):
        return torch.randint(-1, count, (self.tokens,), generator=self.generator, dtype=torch.int32)

    def maybe(self, value):
        return value if self.random.random() < 0.6 else None

    def width(self):
        return self.random.choice((4, 8, 12, 20, 32))


# ------------------------------------------------------------------ kernels


@kernel
def pool_cpu(m):
    x = m.normal(m.tokens, m.width())
    return [x, m.cu_seqlens(), m.random.choice(KINDS), m.random.randrange(4), m.random.random() < 0.3]


@kernel
def pool_backward_cpu(m):
    x, cu_seqlens, *rest = pool_cpu(m)
    return [m.normal(len(m.lengths), x.shape[1]), x, cu_seqlens, m.tokens, *rest]


@kernel
def layer_norm_cpu(m):
    dim, lengths = m.width(), m.random.randrange(1, 4)
    branch = m.maybe(m.normal(m.tokens, dim))
    weight, bias = (m.maybe(m.normal(lengths, dim, dtype=torch.float32)) for _ in range(2))
    gamma = None if branch is None else m.maybe(m.normal(dim, dtype=torch.float32))
    return [
        m.normal(m.tokens, dim),
        weight,
        bias,
        m.maybe(m.rows(lengths)),
        branch,
        gamma,
        1e-6,
        m.random.random() < 0.3,
    ]


@kernel
def layer_norm_backward_cpu(m):
    x, weight, bias, row, branch, gamma, _, rms = layer_norm_cpu(m)
    branch = None if gamma is None else branch
    statistics = [m.normal(m.tokens, dtype=torch.float32) for _ in range(2)]
    dsum = m.maybe(m.normal(*x.shape))
    return [m.normal(*x.shape), dsum, x, weight, bias, row, branch, gamma, *statistics, rms]


@kernel
def pack_cpu(m):
    out, inputs = m.width(), m.width()
    rows = [m.maybe(m.normal(out, dtype=torch.float32)) for _ in range(2)]
    return [m.normal(out, inputs), *rows, _kind(m)]


@kernel
def linear_cpu(m):
    weight, bias, gamma, _ = pack_cpu(m)
    packed = _packed(weight, bias, gamma, int(m.dtype == torch.bfloat16))
    return [m.normal(m.tokens, weight.shape[1]), packed, weight.shape[0], m.random.randrange(5)]


def _packed(weight, bias, gamma, kind):
    return torch.ops.revit_kernels.pack_cpu(weight, bias, gamma, kind)


@kernel
def attention_cpu(m):
    heads, dim = m.random.randrange(1, 4), m.random.choice((1, 3, 8, 16, 20))
    q, k, v = m.normal(m.tokens, 3, heads, dim).unbind(1)
    rotary = [None, None, None, False]
    if m.random.random() < 0.4 and dim > 1:
        table = (5, dim // 2) if m.random.random() < 0.5 else (5, heads, dim // 2)
        cos, sin = (m.normal(*table, dtype=torch.float32) for _ in range(2))
        rotary = [cos, sin, m.rows(5), m.random.random() < 0.5]
    return [q, k, v, m.cu_seqlens(), m.cu_seqlens(), 0.3, *rotary]


@kernel
def attention_backward_cpu(m):
    q, k, v, *rest = attention_cpu(m)
    lse = m.normal(*q.shape[:2], dtype=torch.float32)
    return [m.normal(*q.shape), q, k, v, lse, *rest]


@kernel
def temporal_attention_cpu(m):
    q, k, v = m.normal(m.tokens, 3, m.random.randrange(1, 4), m.random.choice((1, 3, 8, 16, 20))).unbind(1)
    frames = torch.tensor([m.random.choice((1, 2, 3, length or 1)) for length in m.lengths], dtype=torch.int32)
    return [q, k, v, m.cu_seqlens(), frames, m.random.randrange(3), 0.3]


@kernel
def temporal_attention_backward_cpu(m):
    q, *rest = temporal_attention_cpu(m)
    return [m.normal(*q.shape), q, *rest]


def _block_weights(m):
    dim, heads, head_dim = m.width(), m.random.choice((1, 2)), m.random.choice((4, 8))
    width, hidden, fields = heads * head_dim, m.random.choice((m.width(), 7)), {}

    def norm(name, size, needed=False):
        if needed or m.random.random() < 0.3:
            fields[name], fields[f"{name}_bias"] = m.normal(size), m.maybe(m.normal(size))

    def product(name, out, inputs, needed=True):
        if needed or m.random.random() < 0.3:
            fields[name], fields[f"{name}_bias"] = m.normal(out, inputs), m.maybe(m.normal(out))

    norm("norm1", dim, True), product("qkv", 3 * width, dim), norm("q_norm", head_dim), norm("k_norm", head_dim)
    norm("attended_norm", width), product("proj", dim, width), norm("norm2", dim, True)
    product("fc1", hidden, dim), product("fc1_x", hidden, dim, False), norm("hidden_norm", hidden)
    product("fc2", dim, hidden)
    fields |= {name: m.maybe(m.normal(dim)) for name in ("gamma1", "gamma2")}
    return dim, heads, width, hidden, BlockWeights(**fields)


def _rotary(m, heads, head_dim):
    if m.random.random() < 0.5:
        return None
    table = (5, head_dim // 2) if m.random.random() < 0.5 else (5, heads, head_dim // 2)
    angles = m.normal(*table, dtype=torch.float32)
    return Rotary(angles.cos(), angles.sin(), m.rows(5), m.random.random() < 0.5)


def _kind(m):
    """Of weights: int8's at times, where this CPU has a product for them."""
    return 2 if m.random.random() < 0.3 and has_kernel("int8") else int(m.dtype == torch.bfloat16)


def _form(m, heads, width, hidden):
    return [[1e-6] * 6, m.random.random() < 0.3, heads, width, hidden, 0.3, m.random.choice((0, 1, 2, 4)), _kind(m)]


@kernel
def block_cpu(m):
    dim, heads, width, hidden, w = _block_weights(m)
    backend, rotary = dispatch.load("block", "cpu"), _rotary(m, heads, width // heads)
    w = backend.padded(w)
    return [
        *(m.normal(m.tokens, dim), m.cu_seqlens(), m.maybe(m.rows(1))),
        *backend.listed([w]),
        *_form(m, heads, width, hidden),
        *(rotary or (None, None, None, False)),
    ]


@kernel
def blocks_cpu(m):
    dim, heads, width, hidden, w = _block_weights(m)
    backend, form, classes = dispatch.load("block", "cpu"), _form(m, heads, width, hidden), 5
    weights, fields = backend.listed([backend.pack(w, "int8" if form[-1] == 2 else None)])
    head = m.normal(3, dim, dtype=torch.float32)
    packed = _packed(m.normal(classes, dim), None, None, int(m.dtype == torch.bfloat16))
    head, of_clips = m.maybe([head, head.clone(), packed]) or [], m.maybe(True)
    rotary = None if of_clips else _rotary(m, heads, width // heads)
    angles = ([], [], None, False) if rotary is None else ([rotary.cos], [rotary.sin], rotary.row, rotary.half)
    x, row = m.normal(m.tokens, dim), m.maybe(m.rows(3))
    blocks = m.random.randrange(1, 3)
    time = (None, [], 0.0, 0.0)
    if of_clips:
        counts = [m.random.choice([n for n in range(1, length + 1) if length % n == 0] or [0]) for length in m.lengths]
        norm = m.normal(2, m.random.randrange(1, 4), dim, dtype=torch.float32).unbind()
        products = [_packed(m.normal(*size), None, None, form[-1]) for size in ((3 * width, dim), (dim, width))]
        time = (torch.tensor(counts, dtype=torch.int32), [*norm, *products] * blocks, 1e-6, 0.3)
    return [x, m.cu_seqlens(), row, weights * blocks, fields, *form, *angles, head, 1e-6, classes, *time]


def _images(m):
    """images, weight, packing, channels_last"""
    m.prefix = m.random.randrange(3)
    patch, channels, last = (
        (m.random.randrange(1, 5), m.random.randrange(1, 5)),
        m.random.choice((1, 3, 4)),
        m.random.random() < 0.5,
    )
    grids = [(m.random.randrange(1, 5), m.random.randrange(1, 5)) for _ in m.lengths]
    capacity = m.prefix * len(grids) + sum(h * w for h, w in grids) + m.tail
    packing = Packing.from_grids(grids, m.prefix, capacity=capacity)
    dtype = m.random.choice((torch.uint8, torch.float32, m.dtype))
    images = []
    for h, w in grids:
        exact = m.random.random() < 0.3
        size = (h * patch[0], w * patch[1]) if exact else (m.random.randrange(1, 40), m.random.randrange(1, 40))
        shape = (*size, channels) if last else (channels, *size)
        images.append((m.normal(*shape, dtype=torch.float32) * 60 + 128).clamp(0, 255).to(dtype))
    return images, m.normal(m.random.choice((4, 8, 20)), channels, *patch), packing, last


@kernel
def patchify_cpu(m):
    images, weight, packing, last = _images(m)
    affine = [[0.5] * weight.shape[1]] * 2
    places = [packing.cu_seqlens, packing.placement]
    return [images, weight, *places, *affine, m.random.random() < 0.5, last, m.prefix, packing.capacity]


@kernel
def patch_embed_cpu(m):
    images, weight, cu_seqlens, placement, *affine, cubic, last, prefix, capacity = patchify_cpu(m)
    if weight[0].numel() % 4:  # as the packed product needs it
        weight = m.normal(weight.shape[0], 4, *weight.shape[2:])
        images = [image[..., :1].repeat(1, 1, 4) if last else image[:1].repeat(4, 1, 1) for image in images]
    packed = _packed(weight.flatten(1), m.maybe(m.normal(weight.shape[0])), None, int(m.dtype == torch.bfloat16))
    cells = int((placement[:, 2] + placement[:, 0] * placement[:, 1]).max()) if len(placement) else 0
    rows = [m.maybe(m.normal(count, weight.shape[0])) for count in (cells, prefix)]
    affine = [[0.5] * weight.shape[1]] * 2
    return [images, weight, packed, cu_seqlens, placement, *rows, *affine, cubic, last, prefix, capacity]


@kernel
def place_cpu(m):
    _, weight, packing, _ = _images(m)
    cells = sum(h * w for h, w in packing.menu)
    rows = [m.maybe(m.normal(count, weight.shape[0])) for count in (cells, m.prefix)]
    return [m.normal(packing.capacity, weight.shape[0]), packing.cu_seqlens, packing.placement, *rows, m.prefix]


@kernel
def patch_embed_sums_cpu(m):
    _, weight, packing, _ = _images(m)
    cells = sum(h * w for h, w in packing.menu)
    return [m.normal(packing.capacity, weight.shape[0]), packing.cu_seqlens, packing.placement, m.prefix, cells]


@kernel
def patch_embed_weight_cpu(m):
    return [m.normal(m.tokens, 8), m.normal(m.tokens, 12), m.cu_seqlens()]


def _table(m):
    sizes = [m.random.randrange(1, 7) for _ in range(2 * m.random.randrange(4))]
    how = [m.random.choice(("bicubic", "bilinear")), m.random.random() < 0.5, False, m.random.choice((0.0, 0.1))]
    return m.random.randrange(1, 9), m.random.randrange(1, 9), sizes, how


@kernel
def pos_embed_cpu(m):
    rows, columns, sizes, how = _table(m)
    return [m.normal(rows, columns, m.width()), sizes, *how]


@kernel
def pos_embed_backward_cpu(m):
    rows, columns, sizes, how = _table(m)
    cells = sum(h * w for h, w in zip(sizes[::2], sizes[1::2]))
    return [m.normal(cells, m.width()), rows, columns, sizes, *how]


# ------------------------------------------------------------------ torch ops


@torch_op
def packs_cpu(m):
    return [m.random.randrange(3)]


@torch_op
def linear_quantize(m):
    return [m.normal(m.tokens, 12), m.random.choice((1, 3, 4, 12)), None]


@torch_op
def patch_embed_places(m):
    images, weight, _, last = _images(m)
    images = images or [torch.zeros(2, 2, 2)]
    return [images, list(weight.shape[2:]), m.random.randrange(1, 30), m.prefix, last]


@torch_op
def patch_embed_listed(m):
    images, weight, _, last = _images(m)
    images, dim = images or [m.normal(*[weight.shape[1]] * 3)], weight.shape[0]
    limits = [list(weight.shape[2:]), m.random.randrange(1, 30), m.prefix, last]
    image = torch.ops.revit_kernels.patch_embed_places(images, *limits)[1]
    rows = [m.maybe(m.normal(*shape, dim)) for shape in ((), (3, 4))]
    rows.append(m.normal(m.prefix, dim) if m.prefix else None)
    statistics = [[0.5] * weight.shape[1]] * 2
    how = [m.random.choice(("bicubic", "bilinear")), "bicubic", m.random.random() < 0.5]
    return [images, weight, *rows, image, *statistics, *how, *limits]


class Calls(TorchDispatchMode):
    """The torch ops that a function runs, and their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("revit_kernels::"):
            self.seen.append((name.partition("::")[2], tree_map_only(torch.Tensor, torch.Tensor.detach, list(args))))
        return function(*args, **(kwargs or {}))


def torch_ops_of(name: str, m: Making) -> list:
    """(name, arguments) of each torch op that a public function runs, its backward too."""
    function, named = CALLS[name](m)

    def leaf(x):
        return x.detach().requires_grad_(x.is_floating_point() and x.dtype.itemsize > 1 and m.random.random() < 0.7)

    if not name.endswith("fp8"):
        named = {key: x if key == "images" else tree_map_only(torch.Tensor, leaf, x) for key, x in named.items()}
    with Calls() as calls:
        found = function(**named)
        for out in found if isinstance(found, tuple) else (found,):
            if isinstance(out, torch.Tensor) and out.requires_grad:
                out.backward(torch.ones_like(out), retain_graph=True)
    return calls.seen


# ------------------------------------------------------------------ public functions: (function, arguments)


@public
def pool(m):
    x, cu_seqlens, kind, prefix, include = pool_cpu(m)
    return ops.pool, dict(x=x, cu_seqlens=cu_seqlens, kind=kind, prefix=prefix, include_prefix=include)


@public
def layer_norm(m):
    names = ("x", "weight", "bias", "row", "branch", "gamma", "eps", "rms")
    args = dict(zip(names, layer_norm_cpu(m)))
    if args["bias"] is not None and args["weight"] is not None:
        args["bias"] = args["bias"].to(args["weight"].dtype)
    return ops.layer_norm, args


@public
def layer_norm_fp8(m):
    return ops.layer_norm_fp8, layer_norm(m)[1]


@public
def linear(m):
    weight, bias, *_ = pack_cpu(m)
    bias = None if bias is None else bias.to(weight.dtype)
    how = dict(activation=m.random.choice(EPILOGUES), gate=m.random.choice(GATES))
    return ops.linear, dict(x=m.normal(m.tokens, weight.shape[1]), weight=weight, bias=bias, **how)


@public
def linear_fp8(m):
    args = linear(m)[1]
    group = m.random.choice((None, None, 128)) if m.tokens else None
    inputs = 256 if group else m.width()
    weight = m.normal(args["weight"].shape[0], inputs)
    return ops.linear_fp8, args | dict(x=quantize(m.normal(m.tokens, inputs), group), weight=quantize(weight))


@public
def attention(m):
    q, k, v, cu_seqlens, _, scale, cos, sin, row, half = attention_cpu(m)
    rotary = None if cos is None else Rotary(cos, sin, row, half)
    longest = max(m.lengths, default=0)
    args = dict(q=q, k=k, v=v, cu_seqlens=cu_seqlens, max_seqlen=longest, scale=scale, rotary=rotary)
    if rotary is None and m.random.random() < 0.3:  # of other images
        lengths = [m.random.choice((0, 1, 3, 20)) for _ in m.lengths]
        args["k"], args["v"] = m.normal(sum(lengths) + m.tail, 2, *q.shape[1:]).unbind(1)
        args["cu_seqlens_k"] = torch.tensor([0, *lengths]).cumsum(0).int()
        args["max_seqlen_k"] = max(lengths, default=0)
    return ops.attention, args


@public
def temporal_attention(m):
    q, k, v, cu_seqlens, frames, prefix, scale = temporal_attention_cpu(m)
    most = int(frames.max()) if len(frames) else 0
    args = dict(q=q, k=k, v=v, cu_seqlens=cu_seqlens, frames=frames, max_frames=most, prefix=prefix, scale=scale)
    return ops.temporal_attention, args


@public
def block(m):
    dim, heads, width, _, weights = _block_weights(m)
    row = m.maybe(m.rows(1))
    how = dict(heads=heads, activation=m.random.choice(ACTIVATIONS), rotary=_rotary(m, heads, width // heads))
    return ops.block, dict(x=m.normal(m.tokens, dim), cu_seqlens=m.cu_seqlens(), weights=weights, row=row, **how)


@public
def patch_embed(m):
    images, weight, packing, last = _images(m)
    cells = sum(h * w for h, w in packing.menu)
    pos, prefix, bias = (m.maybe(m.normal(*shape, weight.shape[0])) for shape in ((cells,), (m.prefix,), ()))
    return ops.patch_embed, dict(
        images=images, weight=weight, bias=bias, packing=packing, pos=pos, prefix=prefix, channels_last=last
    )


@public
def resize_patch_weight(m):
    weight = m.normal(m.width(), *(m.random.randrange(1, 6) for _ in range(3)))
    size = tuple(m.random.randrange(1, 9) for _ in range(2))
    how = dict(interpolation=m.random.choice(("bicubic", "bilinear")), antialias=m.random.random() < 0.5)
    return resized_patch_weight, dict(weight=weight, size=size, **how)


def resized_patch_weight(backend=None, **named):
    return ops.resize_patch_weight(**named)


@public
def pos_embed(m):
    table, sizes, mode, antialias, corners, offset = pos_embed_cpu(m)
    grids = list(zip(sizes[::2], sizes[1::2]))
    how = dict(interpolation=mode, antialias=antialias, align_corners=corners, offset=offset)
    return ops.pos_embed, dict(table=table, grids=grids, **how)
