output "kms_key_id" {
  description = "The key; every other module takes it. Known only when the services may use it."
  value       = google_kms_crypto_key.this.id
  depends_on  = [google_kms_crypto_key_iam_member.agent]
}
