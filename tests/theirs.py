"""Other people's optimizers, where there are no stored numbers, from their formulas.

In NumPy and float64: ASDL's K-FAC with its scales and SGD, for a network of two layers. And the
names of all others' arguments.
"""

import numpy as np

SHAPES = ((5, 6), (6, 3))  # inputs and outputs of the layers


def network(seed=0):
  """Weights with the bias as their last row."""
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(n + 1, m)) / np.sqrt(n) for n, m in SHAPES]


def batches(steps, examples=12, seed=1):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(steps, examples, SHAPES[0][0]))
  return x, rng.integers(SHAPES[-1][1], size=(steps, examples))


def with_one(a):
  return np.concatenate([a, np.ones((len(a), 1))], axis=1)


def backward(weights, x, y):
  """Gradients of the mean loss, and of each layer its inputs and the examples' own `dy`."""
  first = with_one(x)
  hidden = np.tanh(first @ weights[0])
  second = with_one(hidden)
  p = np.exp(second @ weights[1])
  g2 = p / p.sum(axis=1, keepdims=True) - np.eye(SHAPES[-1][1])[y]
  g1 = (g2 @ weights[1][:-1].T) * (1 - hidden**2)
  rows = [(first, g1), (second, g2)]
  return [a.T @ g / len(x) for a, g in rows], rows


def damped(A, G, V, damping):
  """`(A + pi sqrt(damping) I)^-1 V (G + sqrt(damping) / pi I)^-1`."""
  pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
  A = A + np.sqrt(damping) * pi * np.eye(len(A))
  G = G + np.sqrt(damping) / pi * np.eye(len(G))
  return np.linalg.solve(A, V) @ np.linalg.inv(G)


def asdl(weights, x, y, *, lr, momentum, weight_decay, damping, scale, grad_scale):
  """Weights after each step, without biases in blocks or in training, then PyTorch's SGD."""
  weights, trace, after = list(weights), [0.0, 0.0], []
  for batch in zip(x, y, strict=True):
    grads, rows = backward(weights, *batch)
    for i, ((a, g), V) in enumerate(zip(rows, grads, strict=True)):
      A, B = (scale * own.T @ own / len(a) for own in (a[:, :-1], g))
      w, bias = weights[i][:-1], weights[i][-1:]
      direction = damped(A, B, grad_scale * V[:-1], damping)
      trace[i] = momentum * trace[i] + direction + weight_decay * w
      weights[i] = np.concatenate([w - lr * trace[i], bias])
    after.append(list(weights))
  return after


# Of kfac-jax babd853, nikhilvyas/SOAP a1e5535, facebookresearch/optimizers f606606, google-research
# 01aac34, asdl b7afcaa, kfac-pytorch 869cf11.
KFAC_JAX = """value_and_grad_func l2_reg regularized_parameters_path_exclusions value_func_has_aux
value_func_has_state value_func_has_rng value_func_for_estimator use_adaptive_learning_rate
learning_rate_schedule use_adaptive_momentum momentum_schedule use_adaptive_damping damping_schedule
initial_damping use_initial_damping_calibration min_damping max_damping
include_damping_in_quad_change damping_adaptation_interval damping_adaptation_decay
damping_lower_threshold damping_upper_threshold always_use_exact_qmodel_for_damping_adjustment
precon_damping_mult precon_damping_schedule use_step_rejection reject_damping_increase_factor
norm_constraint num_burnin_steps estimation_mode custom_estimator_ctor curvature_ema
curvature_update_period inverse_update_period use_exact_inverses batch_process_func
register_only_generic patterns_to_skip use_automatic_registration auto_register_kwargs
layer_tag_to_block_ctor multi_device debug invalid_metric_value batch_size_extractor pmap_axis_name
forbid_setting_attributes_after_finalize modifiable_attribute_exceptions include_norms_in_stats
include_per_param_norms_in_stats include_registered_loss_in_stats distributed_precon_apply
distributed_inverses num_estimator_samples should_vmap_estimator_samples
norm_to_scale_identity_weight_per_block precon_power exact_quad_model_matrix_type"""
SOAP = """params lr betas shampoo_beta eps weight_decay precondition_frequency
max_precond_dim merge_dims precondition_1d normalize_grads data_format correct_bias"""
META_SHAMPOO = """params lr betas beta3 epsilon weight_decay weight_decay_type
max_preconditioner_dim precondition_frequency start_preconditioning_step use_bias_correction
iterate_averaging_config grafting_config use_pin_memory shampoo_pt2_compile_config
distributed_config preconditioner_config shampoo_runtime_config concurrency_config"""
SCALABLE_SHAMPOO = """learning_rate block_size beta1 beta2 diagonal_epsilon matrix_epsilon
weight_decay start_preconditioning_step preconditioning_compute_steps statistics_compute_steps
best_effort_shape_interpretation graft_type nesterov exponent_override batch_axis_name
statistics_partition_spec preconditioner_partition_spec num_devices_for_pjit shard_optimizer_states
best_effort_memory_usage_reduction inverse_failure_threshold moving_average_for_momentum
skip_preconditioning_dim_size_gt clip_by_scaled_gradient_norm precision tensordot_precision
relative_matrix_epsilon merge_small_dims_block_size lobpcg_topk_precondition lobpcg_max_iter
precondtioner_type skip_preconditioning_rank_lt decoupled_learning_rate decoupled_weight_decay
generate_training_metrics"""
ASDL = """num_total_steps preconditioner_upd_interval preconditioner_warmup_steps
preconditioner_upd_ratio preconditioner_warmup_ratio preconditioner_interval_type
curvature_upd_interval curvature_warmup_steps curvature_upd_ratio curvature_warmup_ratio data_size
damping ema_decay ignore_modules model config fisher_type loss_type scale grad_scale n_mc_samples
var seed swift"""
KAISA = """model factor_update_steps inv_update_steps damping factor_decay kl_clip lr
accumulation_steps allreduce_bucket_cap_mb assignment_strategy colocate_factors compute_method
compute_eigenvalue_outer_product grad_worker_fraction symmetry_aware grad_scaler factor_dtype
inv_dtype skip_layers update_factors_in_hook loglevel"""
