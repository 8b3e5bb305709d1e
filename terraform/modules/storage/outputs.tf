output "bucket" {
  description = "Name of the checkpoints' bucket."
  value       = aws_s3_bucket.checkpoints.id
}

output "checkpoint_uri" {
  description = "Where a checkpoint is published; the chart's checkpoint source begins with it."
  value       = "s3://${aws_s3_bucket.checkpoints.id}/${var.prefix}"
}

output "reader_role_arn" {
  description = "Role of the pods' service account."
  value       = aws_iam_role.reader.arn
}

output "lustre" {
  description = "What a PersistentVolume of the FSx CSI driver needs; null without a file system."
  value = one([for system in aws_fsx_lustre_file_system.this : {
    file_system_id = system.id
    dns_name       = system.dns_name
    mount_name     = system.mount_name
  }])
}
