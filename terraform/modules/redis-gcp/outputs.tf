output "host" {
  description = "Private address."
  value       = google_redis_instance.this.host
}

output "url" {
  description = "URL without the password, as `redis.url` of cluster.yaml wants it. TLS: rediss."
  value       = "rediss://${google_redis_instance.this.host}:${google_redis_instance.this.port}/0"
}

output "certificate_authority" {
  description = "Certificate that clients must trust, PEM."
  value       = google_redis_instance.this.server_ca_certs[0].cert
}

output "instance" {
  description = "Name of the instance, for `gcloud redis instances get-auth-string`."
  value       = google_redis_instance.this.name
}
