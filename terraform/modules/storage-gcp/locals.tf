locals {
  # The pods' identity, without a Google service account between.
  reader = join("", [
    "principal://iam.googleapis.com/projects/%s/locations/global/workloadIdentityPools/${var.workload_pool}",
    "/subject/ns/${var.service_account.namespace}/sa/${var.service_account.name}",
  ])
}
