output "kms_key_arn" {
  description = "The key; every other module takes it."
  value       = aws_kms_key.this.arn
}
