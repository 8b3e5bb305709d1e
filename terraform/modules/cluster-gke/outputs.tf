output "name" {
  description = "The cluster's name; known only when its CPU nodes are there."
  value       = google_container_cluster.this.name
  depends_on  = [google_container_node_pool.system]
}

output "endpoint" {
  description = "Private address of the API server."
  value       = google_container_cluster.this.endpoint
}

output "certificate_authority" {
  description = "The API server's certificate authority, base64."
  value       = google_container_cluster.this.master_auth[0].cluster_ca_certificate
}

output "node_service_account" {
  description = "Account of the nodes; module `gpu-nodepool-gke` takes it."
  value       = google_service_account.node.email
}

output "workload_pool" {
  description = "Workload Identity pool of the cluster; module `storage-gcp` takes it."
  value       = local.workload_pool
}
