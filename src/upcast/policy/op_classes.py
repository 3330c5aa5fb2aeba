"""Which torch function belongs to which op class, by name: torch.add, Tensor.add_ and ``+`` are one entry.

A function is in CLASS_OF, or deliberately in LEFT_OUT with the reason; a test walks all that torch lets one override.
What is left out follows its inputs: float32 when one of them is the result of an upcast operation, float16 otherwise.
"""

import functools
import re
from typing import Any, NamedTuple

from torch import nn

from upcast.policy.policy import CLASSES

_NAMES = {
    "linear": """
        linear bilinear conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution
        embedding embedding_bag grouped_mm scaled_grouped_mm linear_cross_entropy lstm lstm_cell gru gru_cell rnn_relu
        rnn_relu_cell rnn_tanh rnn_tanh_cell miopen_convolution miopen_convolution_add_relu miopen_convolution_relu
        miopen_convolution_transpose miopen_depthwise_convolution miopen_rnn""",
    "scores": """
        scaled_dot_product_attention multi_head_attention_forward matmul mm bmm mv dot vdot inner outer ger addmm
        addmv addbmm baddbmm addr einsum tensordot chain_matmul linalg_matmul linalg_multi_dot linalg_vecdot kron
        cdist pairwise_distance pdist dist cosine_similarity matrix_power linalg_matrix_power trapezoid trapz spmm smm
        dsmm hsmm hspmm saddmm sspaddmm""",
    "norm": """
        layer_norm rms_norm group_norm batch_norm instance_norm local_response_norm native_layer_norm
        native_batch_norm native_group_norm native_norm batch_norm_elemt batch_norm_gather_stats
        batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats batch_norm_backward_elemt
        batch_norm_backward_reduce miopen_batch_norm norm norm_except_dim frobenius_norm nuclear_norm linalg_norm
        linalg_vector_norm linalg_matrix_norm normalize renorm pow float_power square sqrt rsqrt reciprocal hypot mean
        nanmean sum nansum prod var var_mean std std_mean cumsum cumprod cumulative_trapezoid sum_to_size trace cov
        corrcoef""",
    "softmax": """
        softmax log_softmax softmin gumbel_softmax logsumexp logcumsumexp logaddexp logaddexp2 special_softmax
        special_log_softmax special_logsumexp exp exp2 expm1 log log2 log10 log1p xlogy special_exp2 special_expm1
        special_log1p special_xlogy special_xlog1py special_entr special_log_ndtr logdet slogdet cross_entropy
        nll_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits ctc_loss mse_loss l1_loss smooth_l1_loss
        huber_loss gaussian_nll_loss poisson_nll_loss hinge_embedding_loss cosine_embedding_loss margin_ranking_loss
        multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss soft_margin_loss triplet_margin_loss
        triplet_margin_with_distance_loss""",
    "residual": """
        add sub subtract rsub addcmul addcdiv lerp""",
    "activation": """
        relu relu6 rrelu leaky_relu prelu elu selu celu glu gelu silu mish sigmoid log_sigmoid logit tanh softplus
        softsign softshrink hardshrink tanhshrink hardtanh hardsigmoid hardswish threshold _threshold special_expit
        special_logit special_ndtr erf erfc special_erf special_erfc special_erfcx mul multiply div divide
        true_divide""",
}

CLASS_OF = {name: op_class for op_class in CLASSES for name in _NAMES[op_class].split()}
"""Function's name -> op class. Products belong to ``linear`` where a weight takes part; sums and products of tensors
count only when both are activations of one shape (see `op_class`)."""

LEFT_OUT = {
    "looks at the same numbers, moves or selects them": """
        __getitem__ __setitem__ __contains__ __reversed__ adjoint alias_copy argwhere as_strided as_strided_copy
        as_strided_scatter atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cartesian_prod
        cat channel_shuffle chunk clone column_stack combinations concat concatenate constant_pad_nd contiguous copy
        detach detach_copy diag diag_embed diagflat diagonal diagonal_copy diagonal_scatter dsplit dstack expand
        expand_as expand_copy flatten flip fold fliplr flipud gather hsplit hstack index index_copy index_fill
        index_put index_select masked_fill masked_scatter masked_select meshgrid moveaxis movedim narrow narrow_copy
        native_channel_shuffle pad permute permute_copy pixel_shuffle pixel_unshuffle put ravel repeat
        repeat_interleave reshape reshape_as resize resize_as resize_as_sparse resolve_conj resolve_neg roll rot90
        row_stack scatter select select_copy select_scatter slice_copy slice_inverse slice_scatter split split_copy
        split_with_sizes split_with_sizes_copy squeeze squeeze_copy stack swapaxes swapdims t t_copy take
        take_along_dim tensor_split tile transpose transpose_copy tril triu unbind unbind_copy unflatten unfold
        unfold_copy unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy view view_as
        view_as_complex view_as_complex_copy view_as_real view_as_real_copy view_copy vsplit vstack where""",
    "orders, compares or counts": """
        __eq__ __ge__ __gt__ __le__ __lt__ __ne__ all allclose any argmax argmin argsort bincount bucketize
        count_nonzero eq equal ge greater greater_equal gt heaviside histc histogram histogramdd is_same_size
        is_set_to isclose isfinite isin isinf isnan isneginf isposinf isreal kthvalue le less less_equal lt median
        mode msort multinomial nanmedian nanquantile ne nextafter nonzero nonzero_static not_equal one_hot quantile
        searchsorted signbit sort topk unique unique_consecutive unravel_index""",
    "gives one of its inputs, or a bound": """
        abs absolute adaptive_max_pool1d adaptive_max_pool1d_with_indices adaptive_max_pool2d
        adaptive_max_pool2d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices amax amin aminmax ceil
        clamp clamp_max clamp_min clip copysign cummax cummin fix floor fmax fmin frac fractional_max_pool2d
        fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices frexp max
        max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices
        max_unpool1d max_unpool2d max_unpool3d maximum min minimum nan_to_num neg negative positive round sgn sign
        special_round trunc __neg__""",
    "averages or interpolates: no larger than its input": """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d grid_sample
        grid_sampler grid_sampler_2d grid_sampler_3d interpolate lp_pool1d lp_pool2d lp_pool3d""",
    "drops or draws at random": """
        alpha_dropout bernoulli binomial cauchy dropout dropout1d dropout2d dropout3d exponential
        feature_alpha_dropout feature_dropout geometric log_normal native_dropout normal poisson random uniform""",
    "of angles: rotary tables are made in float32 by the models themselves": """
        acos acosh affine_grid affine_grid_generator angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin
        asinh atan atan2 atanh cos cosh deg2rad polar rad2deg sin sinc sinh special_sinc tan""",
    "remainders, differences and scaling": """
        __floordiv__ __ifloordiv__ __imod__ __mod__ __rfloordiv__ __rmod__ cross diff floor_divide fmod gradient ldexp
        linalg_cross remainder index_add index_reduce scatter_add scatter_reduce""",
    "special functions and matrix decompositions, which have no float16 kernels": """
        _sym_sqrt cholesky cholesky_inverse cholesky_solve det digamma erfinv geqrf i0 igamma igammac inverse lgamma
        linalg_cholesky linalg_cholesky_ex linalg_cond linalg_det linalg_diagonal linalg_eig linalg_eigh
        linalg_eigvals linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_ldl_factor
        linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex
        linalg_lu_solve linalg_matrix_exp linalg_matrix_rank linalg_pinv linalg_qr linalg_slogdet linalg_solve
        linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve
        linalg_vander lobpcg lu lu_solve lu_unpack matrix_exp mvlgamma orgqr ormqr pca_lowrank pinverse polygamma qr
        svd svd_lowrank triangular_solve special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0
        special_bessel_y1 special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
        special_chebyshev_polynomial_w special_digamma special_erfinv special_gammainc special_gammaincc
        special_gammaln special_hermite_polynomial_h special_hermite_polynomial_he special_i0 special_i0e special_i1
        special_i1e special_laguerre_polynomial_l special_legendre_polynomial_p special_modified_bessel_i0
        special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1 special_multigammaln
        special_ndtri special_polygamma special_psi special_scaled_modified_bessel_k0
        special_scaled_modified_bessel_k1 special_shifted_chebyshev_polynomial_t
        special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
        special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0 special_zeta""",
    "Fourier transforms, which have no float16 kernels on the CPU": """
        fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
        fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn istft stft""",
    "integers, logic and complex numbers": """
        __and__ __iand__ __ilshift__ __invert__ __ior__ __irshift__ __ixor__ __lshift__ __or__ __rand__ __rlshift__
        __ror__ __rrshift__ __rshift__ __rxor__ __xor__ bitwise_and bitwise_left_shift bitwise_not bitwise_or
        bitwise_right_shift bitwise_xor complex conj conj_physical gcd imag lcm logical_and logical_not logical_or
        logical_xor real""",
    "makes a tensor": """
        empty_like fill fill_diagonal full_like new_empty new_full new_ones new_zeros ones_like rand_like randn_like
        zero zeros_like""",
    "converts: the type that the model asks for is heeded (see `upcast.policy.mode`)": """
        _autocast_to_full_precision _autocast_to_reduced_precision bfloat16 bool byte cdouble cfloat chalf char cpu
        cuda double float half int ipu long mtia short to to_dense to_mkldnn to_sparse type type_as xpu""",
    "quantized and sparse": """
        _coalesced _dimI _dimV _indices _nested_tensor_size _nested_tensor_storage_offsets _nested_tensor_strides _nnz
        _sparse_mask_projection _to_dense _values ccol_indices ccol_indices_copy choose_qparams_optimized coalesce
        col_indices col_indices_copy crow_indices crow_indices_copy dense_dim dequantize
        fake_quantize_per_channel_affine fake_quantize_per_tensor_affine fbgemm_linear_fp16_weight
        fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation
        fbgemm_linear_quantize_weight fbgemm_pack_gemm_matrix_fp16 fbgemm_pack_quantized_matrix
        fused_moving_avg_obs_fake_quant indices indices_copy int_repr is_coalesced q_per_channel_axis
        q_per_channel_scales q_per_channel_zero_points q_scale q_zero_point qscheme quantize_per_channel
        quantize_per_tensor quantize_per_tensor_dynamic quantized_batch_norm quantized_gru_cell quantized_lstm_cell
        quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d quantized_rnn_relu_cell quantized_rnn_tanh_cell
        row_indices row_indices_copy sparse_dim sparse_mask sparse_resize sparse_resize_and_clear values values_copy""",
    "asks about a tensor, or hands it to Python": """
        __array__ __array_wrap__ __bool__ __complex__ __deepcopy__ __dlpack__ __dlpack_device__ __float__ __format__
        __get__ __set__ __index__ __int__ __len__ __long__ __nonzero__ __reduce_ex__ __repr__ __setstate__ __delete__
        _clear_non_serializable_cached_data _is_view apply autocast backward const_data_ptr data_ptr dim dim_order
        element_size get_device hash_tensor is_complex is_conj is_contiguous is_distributed is_floating_point
        is_inference is_neg is_nonzero is_pinned is_shared is_signed item map map2 module_load ndimension nelement
        numel numpy pin_memory record_stream register_hook register_post_accumulate_grad_hook requires_grad
        retain_grad set share_memory size storage storage_offset storage_type sym_float sym_int sym_ite sym_max
        sym_min sym_not sym_sum tolist untyped_storage""",
}

ALL_LEFT_OUT = {name for names in LEFT_OUT.values() for name in names.split()}
_PRODUCTS = "matmul mm bmm mv addmm addmv addbmm baddbmm einsum inner tensordot dot linalg_matmul"
_WITH_WEIGHT = frozenset(_PRODUCTS.split())
_SUMS_AND_GATES = "add sub subtract rsub lerp mul multiply div divide true_divide"
_OF_ACTIVATIONS = frozenset(_SUMS_AND_GATES.split())
_ASKS = frozenset(LEFT_OUT["asks about a tensor, or hands it to Python"].split())

_MODULE_CLASSES = (
    (re.compile(r"norm", re.IGNORECASE), "norm"),
    (re.compile(r"(gelu|silu|swish|relu|mish|activation|sigmoid|tanh)", re.IGNORECASE), "activation"),
    (re.compile(r"softmax", re.IGNORECASE), "softmax"),
)


class Known(NamedTuple):
    """What is known of a function without its arguments.

    Attributes:
        name: the one that it is listed under.
        op_class: the class that it belongs to, if its arguments do not speak against it; None: it is left out.
        decided: its arguments cannot speak against it.
        writes: it changes its first argument.
        asks: it asks about a tensor, or hands it to Python.
    """

    name: str
    op_class: str | None
    decided: bool
    writes: bool
    asks: bool


@functools.lru_cache(maxsize=4096)
def known(function: Any) -> Known:
    """Return what is known of a function or method of torch, worked out once: a pass asks for each of its calls."""
    name = name_of(function)
    decided = name not in _WITH_WEIGHT and name not in _OF_ACTIVATIONS
    return Known(name, CLASS_OF.get(name), decided, _writes(function), name in _ASKS)


def name_of(function: Any) -> str:
    """Return the name under which a function is listed: ``add`` for torch.add, Tensor.add_, ``+`` and ``+=``."""
    name = str(getattr(function, "__name__", function))
    if name in ALL_LEFT_OUT or name in CLASS_OF:
        return name
    bare = name.strip("_")
    if name.startswith("__"):
        candidates = [bare, bare[1:] if bare[:1] in ("i", "r") else bare]
        candidates = ["rsub" if name == "__rsub__" else "", *candidates]
        candidates = [{"truediv": "div"}.get(each, each) for each in candidates]
    else:
        candidates = [name.rstrip("_"), name.lstrip("_"), bare]
    return next((each for each in candidates if each in CLASS_OF or each in ALL_LEFT_OUT), name)


def listed(function: Any) -> bool:
    """Whether a function is in the table or deliberately left out."""
    return name_of(function) in CLASS_OF or name_of(function) in ALL_LEFT_OUT


def _writes(function: Any) -> bool:
    """Whether a function changes its first argument."""
    name = str(getattr(function, "__name__", function))
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return name.endswith("_")


def module_class(module: nn.Module) -> str | None:
    """Return the op class of all that a module computes, if its kind says so: hand-written norms, activations."""
    if next(module.children(), None) is not None:
        return None
    name = type(module).__name__
    return next((op_class for pattern, op_class in _MODULE_CLASSES if pattern.search(name)), None)


def of_activations(name: str) -> bool:
    """Whether a listed function counts only between two activations of one shape."""
    return name in _OF_ACTIVATIONS
