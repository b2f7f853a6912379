"""The words by which the static half of the purity checker tells tensors from other things."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SCALAR_ATTRIBUTES = _words(
    """
    device dtype grad_fn is_cuda is_leaf is_meta is_mps is_sparse itemsize layout names nbytes ndim
    requires_grad
    """
)

TENSOR_ATTRIBUTES = _words("T mT H mH data grad real imag values indices")

SCALAR_METHODS = _words(
    """
    backward data_ptr dense_dim dim element_size get_device has_names is_complex is_contiguous
    is_floating_point is_pinned is_same_size is_set_to is_signed item ndimension nelement numel register_hook
    retain_grad sparse_dim storage storage_offset untyped_storage
    """
)

# Functions and methods that return several tensors; the next, only if they are given a dimension.
PAIR_METHODS = _words(
    """
    align_tensors aminmax atleast_1d_tuple broadcast_tensors chunk cummax cummin dsplit eig eigh frexp hsplit
    kthvalue lstsq lu_factor meshgrid mode multi_head_attention_forward nonzero_tuple qr slogdet sort split
    split_with_sizes std_mean svd tensor_split topk unbind unique_consecutive var_mean vsplit
    """
)

PAIR_WITH_DIMENSION = _words(
    """
    max median min nanmedian unique
    """
)

# Functions of torch that return no tensor.
NOT_TENSOR_CALLS = _words(
    """
    Generator Size Stream allclose autocast broadcast_shapes can_cast compile device dtype enable_grad equal
    finfo get_default_dtype get_num_threads get_rng_state iinfo inference_mode initial_seed
    is_autocast_enabled is_complex is_floating_point is_grad_enabled is_nonzero is_tensor jit load manual_seed
    no_grad numel promote_types result_type save seed set_default_dtype set_grad_enabled set_num_threads
    set_rng_state typename
    """
)

# Names by which the field calls tensors; they decide for parameters that nothing else decides.
TENSOR_NAMES = _words(
    """
    attention attn bbox bboxes bias boxes coords embed embedding embeddings feat feats feature features grad
    gradient heatmap hidden hidden_states image images img imgs input inputs keys latents logits loss losses
    mask masks out out_bbox out_logits output outputs pixel_values points pred pred_boxes pred_logits
    prediction predictions preds probabilities probs queries query residual scores t target targets tensor
    tensors values weight weights x y z
    """
)

LIST_METHODS = _words(
    """
    append endswith extend insert items join pop popitem setdefault startswith update
    """
)

# Attributes and methods whose use on a name shows that it is a tensor.
TENSOR_METHODS = _words(
    """
    abs amax amin argmax argmin backward bmm bool chunk clamp clip clone contiguous cpu cuda cumprod cumsum
    detach device dim double dtype exp expand expand_as flatten flip float gather grad_fn half index_select
    int is_cuda item log log_softmax long masked_fill matmul mean mm ndim new_full new_ones new_tensor
    new_zeros nonzero norm numel numpy permute pow relu repeat requires_grad_ reshape roll scatter shape
    sigmoid size softmax sqrt squeeze sum t tanh to tolist topk transpose type_as unbind unflatten unsqueeze
    view where
    """
)

ARRAY_TYPES = _words(
    """
    ArrayLike NDArray ndarray
    """
)

SCALAR_TYPES = _words(
    """
    Integral None Number Path Real bool bytes complex device dtype float int slice str
    """
)

# Layers that return a tuple.
LAYERS_WITH_PAIRS = _words(
    """
    GRU LSTM LSTMCell MultiheadAttention RNN
    """
)

# Methods of tensors that write in place, without their underscore.
WRITING_METHODS = _words(
    """
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr alpha_dropout apply arccos arccosh
    arcsin arcsinh arctan arctan2 arctanh as_strided asin asinh atan atan2 atanh baddbmm bernoulli bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor cauchy ceil celu clamp clamp_max
    clamp_min clip conj_physical copy copysign cos cosh cumprod cumsum deg2rad detach digamma div divide
    dropout elu eq erf erfc erfinv exp exp2 expm1 exponential feature_dropout fill fill_diagonal fix
    float_power floor floor_divide fmod frac gcd ge geometric greater greater_equal gt hardtanh heaviside
    hypot i0 igamma igammac index_add index_copy index_fill index_put index_reduce lcm ldexp le leaky_relu
    lerp less less_equal lgamma log log10 log1p log2 log_normal logical_and logical_not logical_or logical_xor
    logit lt map map2 masked_fill masked_scatter mul multiply mvlgamma nan_to_num ne neg negative nextafter
    normal not_equal polygamma pow put rad2deg random reciprocal relu remainder renorm resize resize_as round
    rrelu rsqrt scatter scatter_add scatter_reduce selu set sgn sigmoid sign sin sinc sinh sqrt square squeeze
    sub subtract swapaxes swapdims t tan tanh threshold transpose tril triu true_divide trunc uniform
    unsqueeze xlogy zero
    """
)

# Trailing underscores that write no values.
NO_WRITE = _words(
    """
    _ rename_ requires_grad_ share_memory_
    """
)
