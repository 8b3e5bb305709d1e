output "network_id" {
  description = "The VPC. Known only when the peering for managed services is there."
  value       = google_compute_network.this.id
  depends_on  = [google_service_networking_connection.managed]
}

output "subnetwork_id" {
  description = "Subnet of the nodes; its secondary ranges are named `pods` and `services`."
  value       = google_compute_subnetwork.nodes.id
}

output "node_cidr" {
  description = "Range of the nodes."
  value       = google_compute_subnetwork.nodes.ip_cidr_range
}
