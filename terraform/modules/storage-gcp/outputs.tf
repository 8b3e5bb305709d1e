output "bucket" {
  description = "Name of the checkpoints' bucket."
  value       = google_storage_bucket.checkpoints.name
}

output "checkpoint_uri" {
  description = "Where a checkpoint is published; the chart's checkpoint source begins with it."
  value       = "gs://${google_storage_bucket.checkpoints.name}/"
}
