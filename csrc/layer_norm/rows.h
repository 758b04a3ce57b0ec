// LayerNorm of rows of tokens, forward and backward. No include guard: compiled once per instruction set.

template <class X, class B>
inline void forward_row(const ForwardArguments& a, int64_t token, float* s) {
  const int64_t dim = a.dim, at = token * dim;
  X* y = static_cast<X*>(a.y) + at;
  X* sum = static_cast<X*>(a.sum) + at;
  if (a.row && a.row[token] < 0) {
    std::memset(y, 0, dim * sizeof(X));
    if (a.branch) std::memset(sum, 0, dim * sizeof(X));
    a.mean[token] = a.rstd[token] = 0;
    return;
  }
  const X* x = static_cast<const X*>(a.x) + at;
  const B* branch = static_cast<const B*>(a.branch) + at;
  const float* gamma = a.gamma;
  Floats partial[4] = {};
  if (a.branch)
    each_vector(dim, [&](int64_t i, auto n, int k) {
      const Floats v = store(sum + i, load(x + i, n) + load(gamma + i, n) * load(branch + i, n), n);
      store(s + i, v, n);
      partial[k] += v;
    });
  else
    each_vector(dim, [&](int64_t i, auto n, int k) {
      const Floats v = load(x + i, n);
      store(s + i, v, n);
      partial[k] += v;
    });
  const float mean = a.rms ? 0 : total((partial[0] + partial[1]) + (partial[2] + partial[3])) / dim;
  Floats square[4] = {};
  each_vector(dim, [&](int64_t i, auto n, int k) {
    const Floats centred = keep(load(s + i, n) - mean, n);
    square[k] += centred * centred;
  });
  const float rstd = 1 / std::sqrt(total((square[0] + square[1]) + (square[2] + square[3])) / dim + a.eps);
  const int64_t affine = a.row ? std::min<int64_t>(a.row[token], a.lengths - 1) * dim : 0;
  const float *weight = a.weight + affine, *bias = a.bias + affine;
  each_vector(dim, [&](int64_t i, auto n, int) {
    store(y + i, (load(s + i, n) - mean) * rstd * load(weight + i, n) + load(bias + i, n), n);
  });
  a.mean[token] = mean;
  a.rstd[token] = rstd;
}

// scratch: (dim,)
inline void forward_rows(const ForwardArguments& a, int64_t begin, int64_t end, float* scratch) {
  auto rows = [&](auto row) {
    for (int64_t token = begin; token < end; ++token) row(a, token, scratch);
  };
  if (a.x_is_bf16)
    a.branch_is_bf16 ? rows(forward_row<Bfloat16, Bfloat16>) : rows(forward_row<Bfloat16, float>);
  else
    a.branch_is_bf16 ? rows(forward_row<float, Bfloat16>) : rows(forward_row<float, float>);
}

template <class X, class B>
inline void backward_row(const BackwardArguments& a, int64_t token, Partials& to) {
  const int64_t dim = a.dim, at = token * dim;
  X* dx = static_cast<X*>(a.dx) + at;
  B* dbranch = static_cast<B*>(a.dbranch) + at;
  if (a.row && a.row[token] < 0) {
    std::memset(dx, 0, dim * sizeof(X));
    if (a.branch) std::memset(dbranch, 0, dim * sizeof(B));
    return;
  }
  const int64_t length = a.row ? std::min<int64_t>(a.row[token], a.lengths - 1) : 0;
  float *dweight = to.dweight + length * dim, *dbias = to.dbias + length * dim;
  if (!to.touched[length]) {
    to.touched[length] = true;
    std::memset(dweight, 0, dim * sizeof(float));
    std::memset(dbias, 0, dim * sizeof(float));
  }
  const X* dy = static_cast<const X*>(a.dy) + at;
  const X* dsum = static_cast<const X*>(a.dsum) + token * a.dsum_stride;
  const X* s = static_cast<const X*>(a.sum) + at;
  const B* branch = static_cast<const B*>(a.branch) + at;
  const float *weight = a.weight + length * dim, *gamma = a.gamma;
  float* dgamma = to.dgamma;
  const float mean = a.mean[token], rstd = a.rstd[token];
  Floats plain[4] = {}, projected[4] = {};
  each_vector(dim, [&](int64_t i, auto n, int k) {
    const Floats grad = load(dy + i, n), normed = (load(s + i, n) - mean) * rstd, scaled = grad * load(weight + i, n);
    plain[k] += scaled;
    projected[k] += scaled * normed;
    store(dweight + i, load(dweight + i, n) + grad * normed, n);
    store(dbias + i, load(dbias + i, n) + grad, n);
  });
  const float along_ones = a.rms ? 0 : total((plain[0] + plain[1]) + (plain[2] + plain[3])) / dim;
  const float along_normed = total((projected[0] + projected[1]) + (projected[2] + projected[3])) / dim;
  auto input_grad = [&](int64_t i, auto n) {
    const Floats normed = (load(s + i, n) - mean) * rstd, scaled = load(dy + i, n) * load(weight + i, n);
    return (scaled - along_ones - normed * along_normed) * rstd + load(dsum + i, n);
  };
  if (a.branch)
    each_vector(dim, [&](int64_t i, auto n, int) {
      const Floats ds = input_grad(i, n);
      store(dx + i, ds, n);
      store(dbranch + i, ds * load(gamma + i, n), n);
      store(dgamma + i, load(dgamma + i, n) + ds * load(branch + i, n), n);
    });
  else
    each_vector(dim, [&](int64_t i, auto n, int) { store(dx + i, input_grad(i, n), n); });
}

inline void backward_rows(const BackwardArguments& a, int64_t begin, int64_t end, Partials& to) {
  auto rows = [&](auto row) {
    for (int64_t token = begin; token < end; ++token) row(a, token, to);
  };
  if (a.x_is_bf16)
    a.branch_is_bf16 ? rows(backward_row<Bfloat16, Bfloat16>) : rows(backward_row<Bfloat16, float>);
  else
    a.branch_is_bf16 ? rows(backward_row<float, Bfloat16>) : rows(backward_row<float, float>);
}
