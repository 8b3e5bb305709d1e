# Where checkpoints lie: a bucket that is never public, encrypted with the given key, that one Kubernetes service
# account may read. Pods read it directly or mount it (GCS FUSE, which `cluster-gke` turns on). They never write: who
# publishes a checkpoint has rights of his own.
#
# Never validated against the provider's schema: the google provider was not at hand where this was written. Its form,
# its references and the checks of its variables are tested.

data "google_project" "this" {
  project_id = var.project_id
}

resource "google_storage_bucket" "checkpoints" {
  project                     = var.project_id
  name                        = "${var.project_id}-${var.name}-checkpoints"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false

  encryption {
    default_kms_key_name = var.kms_key_id
  }

  versioning {
    # A checkpoint overwritten by mistake can be had back.
    enabled = true
  }

  lifecycle_rule {
    condition {
      days_since_noncurrent_time = var.old_version_days
    }
    action {
      type = "Delete"
    }
  }

  lifecycle_rule {
    condition {
      age = 7
    }
    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }

  dynamic "logging" {
    for_each = var.access_log_bucket == null ? [] : [var.access_log_bucket]
    content {
      log_bucket = logging.value
    }
  }
}

resource "google_storage_bucket_iam_member" "reader" {
  bucket = google_storage_bucket.checkpoints.name
  role   = "roles/storage.objectViewer"
  member = format(local.reader, data.google_project.this.number)
}
