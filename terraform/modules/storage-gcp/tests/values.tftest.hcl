mock_provider "google" {}

variables {
  name          = "moeray"
  project_id    = "my-project-123"
  region        = "europe-west4"
  workload_pool = "my-project-123.svc.id.goog"
  kms_key_id    = "projects/my-project-123/locations/europe-west4/keyRings/moeray/cryptoKeys/data"
}

run "one_service_account_reads" {
  command = plan
  assert {
    condition     = format(local.reader, "42") == "principal://iam.googleapis.com/projects/42/locations/global/workloadIdentityPools/my-project-123.svc.id.goog/subject/ns/moeray/sa/moeray"
    error_message = "the reader is one service account of one namespace"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    access_log_bucket = "gs://logs"
    name              = "m"
    project_id        = "P"
    region            = "west"
    kms_key_id        = "key"
    workload_pool     = "pool"
    service_account   = { name = "default" }
    old_version_days  = 0
  }
  expect_failures = [
    var.access_log_bucket,
    var.name, var.project_id, var.region, var.kms_key_id, var.workload_pool, var.service_account, var.old_version_days,
  ]
}
