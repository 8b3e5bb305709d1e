locals {
  workload_pool = "${var.project_id}.svc.id.goog"
  # What a node needs: write logs and metrics, pull images. Nothing of the project's data.
  node_roles = toset([
    "roles/artifactregistry.reader",
    "roles/logging.logWriter",
    "roles/monitoring.metricWriter",
    "roles/monitoring.viewer",
    "roles/stackdriver.resourceMetadata.writer",
  ])
}
