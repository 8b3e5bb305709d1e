locals {
  gpu_taint = "nvidia.com/gpu"
  labels    = merge(var.labels, { "moeray.io/pool" = var.pool })

  scheduling = {
    nodeSelector = { "moeray.io/pool" = var.pool }
    tolerations  = [{ key = local.gpu_taint, operator = "Equal", value = "present", effect = "NoSchedule" }]
    resources    = { (local.gpu_taint) = tostring(var.gpus_per_node) }
  }

  reservation_kind = { on-demand = "NO_RESERVATION", spot = "NO_RESERVATION", reservation = "SPECIFIC_RESERVATION" }[var.purchase]
}
