output "node_group_name" {
  description = "Name of the node group."
  value       = aws_eks_node_group.this.node_group_name
}

output "scheduling" {
  description = "What the chart's worker group of this pool must carry: node selector, tolerations, and the resources of one whole node."
  value = {
    nodeSelector = { "moeray.io/pool" = var.pool }
    tolerations  = [{ key = local.gpu_taint, operator = "Equal", value = "present", effect = "NoSchedule" }]
    resources = merge(
      { (local.gpu_taint) = tostring(var.gpus_per_node) },
      local.num_efa == 0 ? {} : { "vpc.amazonaws.com/efa" = tostring(local.num_efa) },
    )
  }
}
