output "node_pool_name" {
  description = "Name of the node pool."
  value       = google_container_node_pool.this.name
}

output "scheduling" {
  description = "What the chart's worker group of this pool must carry: node selector, tolerations, and the resources of one whole node."
  value       = local.scheduling
}
