"""Ops with arguments of wrong boundaries, sizes, strides, types and ranges: at the kernels, the torch ops and the
public functions. What is not refused must be answered, without touching what it was given."""

import random

import torch

from revit_kernels import dispatch, native, ops
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.ops.block import ACTIVATIONS, BlockWeights
from revit_kernels.ops.pool import KINDS
from revit_kernels.packing import Packing

# NumPy's, Python's and PyTorch's own words for arguments that they cannot take are accepted below the public functions.
PUBLIC = (ValueError, NotImplementedError, TypeError)
PRIVATE = (*PUBLIC, RuntimeError, IndexError, OverflowError, MemoryError)
SIZES = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 5, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1)
NUMBERS = (0.0, -1.0, 1e-12, -1 + 1e-12, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"))
WORDS = ("", "avg", "mean", "token", "max", "bicubic", "bilinear", "gelu", "gelu_tanh", "relu", "int8", "cpu", "fast")
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
KERNELS = {}
CALLS = {}


def prepare():
    native.load("cpu")
    for name in dispatch.OPS:
        dispatch.load(name, "cpu")


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
    kind = m.random.choice((int(m.dtype == torch.bfloat16), 2))
    return [m.normal(out, inputs), *rows, kind]


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
    return 2 if m.random.random() < 0.3 else int(m.dtype == torch.bfloat16)


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
def linear(m):
    weight, bias, *_ = pack_cpu(m)
    bias = None if bias is None else bias.to(weight.dtype)
    return ops.linear, dict(x=m.normal(m.tokens, weight.shape[1]), weight=weight, bias=bias)


@public
def attention(m):
    q, k, v, cu_seqlens, _, scale, cos, sin, row, half = attention_cpu(m)
    rotary = None if cos is None else Rotary(cos, sin, row, half)
    longest = max(m.lengths, default=0)
    return ops.attention, dict(q=q, k=k, v=v, cu_seqlens=cu_seqlens, max_seqlen=longest, scale=scale, rotary=rotary)


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
def pos_embed(m):
    table, sizes, mode, antialias, corners, offset = pos_embed_cpu(m)
    grids = list(zip(sizes[::2], sizes[1::2]))
    how = dict(interpolation=mode, antialias=antialias, align_corners=corners, offset=offset)
    return ops.pos_embed, dict(table=table, grids=grids, **how)


# ------------------------------------------------------------------ mutations


def _boundaries(r, x):
    """An integer tensor with some other numbers in it."""
    x = x.clone(memory_format=torch.contiguous_format)
    for _ in range(r.randrange(1, 3)):
        if x.numel() and not x.is_meta:
            low, high = (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
            number = r.choice((low, high, -1, 0, 1, 7, 10**6, int(x.max()) + 1))
            x.view(-1)[r.randrange(x.numel())] = max(low, min(high, number))
    return x


def _other_tensor(r, x):
    kind = r.randrange(10)
    if kind == 0:
        return x.to(r.choice(DTYPES))
    if kind == 1 and x.ndim:
        axis = r.randrange(x.ndim)
        return x.narrow(axis, 0, max(0, x.shape[axis] - r.choice((1, 2, x.shape[axis]))))
    if kind == 2 and x.ndim:
        axis = r.randrange(x.ndim)
        return torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)
    if kind == 3:
        return x.flatten() if r.random() < 0.5 else x[None]
    if kind == 4 and x.ndim > 1:  # the same numbers, other strides
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 5 and x.ndim:  # every other number of a larger one
        return torch.stack([x, x], -1)[..., 0]
    if kind == 6 and x.ndim and x.numel():
        axis = r.randrange(x.ndim)
        size = r.choice((x.shape[axis], 2**31, 2**40))
        return x.narrow(axis, 0, 1).expand(*x.shape[:axis], size, *x.shape[axis + 1 :])
    if kind == 7:
        return x.to("meta")
    if kind == 8 and x.is_floating_point() and x.numel() and not x.is_meta:
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[r.randrange(x.numel())] = r.choice((float("nan"), float("inf"), float("-inf"), 3e38))
        return x
    if not x.is_floating_point() and x.dtype != torch.bool:
        return _boundaries(r, x)
    return x.new_empty(r.choice(((0,), (0, 0), (), (1, 1, 1, 1, 1))))


def mutate(r, value):
    """Another value in its place."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 10**7:  # an expanded one: no copy of it could be made
            return value
        if value.dtype == torch.int32 and r.random() < 0.7:
            return _boundaries(r, value)
        return _other_tensor(r, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice(SIZES) if r.random() < 0.7 else value + r.choice((-1, 1, 4))
    if isinstance(value, float):
        return r.choice(NUMBERS)
    if isinstance(value, str):
        return r.choice(WORDS)
    if isinstance(value, Packing):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a block's weights, or a rotary
        name = r.choice(value._fields)
        return value._replace(**{name: mutate(r, getattr(value, name))})
    if isinstance(value, list | tuple):
        value = list(value)
        kind = r.randrange(4)
        if not value or kind == 0:
            return value[:-1] if r.random() < 0.5 else value + value[-1:]
        at = r.randrange(len(value))
        return [*value[:at], mutate(r, value[at]), *value[at + 1 :]]
    return value


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _bytes(args):
    """The storages of all tensors that are on this machine."""
    found = {}
    for tensor in _tensors(list(args)):
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage
    return found


def attempt(seed: int) -> str:
    m = Making(seed)
    r = m.random
    torch.set_num_threads(r.choice((1, 2)))
    changes = r.choice((0, 1, 1, 1, 2, 3))
    if r.random() < 0.65:
        name = r.choice(list(KERNELS))
        args = KERNELS[name](m)
        for _ in range(changes):
            at = r.randrange(len(args))
            args[at] = None if r.random() < 0.02 else mutate(r, args[at])
        call, refusals = lambda: getattr(torch.ops.revit_kernels, name)(*args), PRIVATE
        given = args[1:] if name == "place_cpu" else args
    else:
        name = r.choice(list(CALLS))
        function, named = CALLS[name](m)
        backend = r.choice((None, "cpu"))
        for _ in range(changes):
            key = r.choice(list(named))
            named[key] = mutate(r, named[key])
        call, refusals = lambda: function(**named, backend=backend), PUBLIC
        given = list(named.values())
        if any(t.dtype not in (torch.float32, torch.bfloat16) for t in _tensors(given) if t.is_floating_point()):
            refusals = PRIVATE  # of the reference, which is plain PyTorch
    before = {at: (storage, bytes(storage)) for at, storage in _bytes(given).items()}
    try:
        with torch.no_grad():
            call()
        word = "answered"
    except (*refusals, RuntimeError) as refused:
        if not isinstance(refused, refusals) and "can't allocate memory" not in str(refused):
            raise
        if not str(refused).strip():
            raise AssertionError(f"{name} was refused with {type(refused).__name__} and no word") from refused
        if not changes:
            raise AssertionError(f"{name} refused arguments that fit: {refused}") from refused
        word = "refused"
    for storage, content in before.values():
        assert bytes(storage) == content, f"{name} wrote to its arguments"
    if refusals is PUBLIC and not changes:
        _compare(function, named, name)
    return word


def _compare(function, named, name):
    """The answer against the definition's in float64; a wide margin, for single numbers may be far off by luck."""

    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, Rotary):
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(wide, value))
        return [wide(v) for v in value] if isinstance(value, list) else value

    with torch.no_grad():
        actual = function(**named)
        exact = function(**{key: wide(value) for key, value in named.items()}, backend="reference")
    actual, exact = ((x if isinstance(x, tuple) else (x,)) for x in (actual, exact))
    for one, other in zip(actual, exact):
        if not other.numel() or not torch.isfinite(other).all():
            continue
        eps = torch.finfo(one.dtype).eps
        allowed = 200 * eps * max(1.0, other.abs().max().item())
        error = (one - other).abs().max().item()
        assert error <= allowed, f"{name} answers wrong by {error:.3g}, {allowed:.3g} allowed"
