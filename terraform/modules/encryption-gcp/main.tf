# One key of Cloud KMS for everything that the other modules store, and the right to use it for the four services that
# store it.
#
# Never validated against the provider's schema: the google provider was not at hand where this was written. Its form,
# its references and the checks of its variables are tested.

data "google_project" "this" {
  project_id = var.project_id
}

resource "google_kms_key_ring" "this" {
  project  = var.project_id
  name     = var.name
  location = var.region
}

resource "google_kms_crypto_key" "this" {
  name            = "data"
  key_ring        = google_kms_key_ring.this.id
  rotation_period = "${var.rotation_days * 86400}s"

  lifecycle {
    # What it encrypted would be lost with it.
    prevent_destroy = true
  }
}

resource "google_kms_crypto_key_iam_member" "agent" {
  for_each      = local.agents
  crypto_key_id = google_kms_crypto_key.this.id
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = "serviceAccount:service-${data.google_project.this.number}@${each.value}.iam.gserviceaccount.com"
}
