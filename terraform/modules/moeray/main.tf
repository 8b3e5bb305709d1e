# moeray itself: one Helm release. It belongs into a root of its own, applied after the cluster's: a provider that
# logs in to a cluster which the same apply creates or replaces is a well-known way to lose both.
#
# It knows these values of the chart: `serviceAccount.name`,
# `workerGroups.<attention|experts>.{nodeSelector,tolerations,resources.limits}`, `redis.{url,existingSecret}` and
# `checkpoint.uri`. The tests of the chart `helm/moeray` hold it to them. Everything else is said in `values`.
# KubeRay's operator and CRDs, the device plugins and the Secrets must be in the cluster before.
#
# Never validated against the provider's schema: the helm provider was not at hand where this was written. Its form,
# its references and the checks of its variables are tested.

resource "helm_release" "moeray" {
  name             = var.release_name
  namespace        = var.namespace
  create_namespace = false # its Secrets come first, hence it is there
  chart            = var.chart
  repository       = var.repository
  version          = var.chart_version
  values           = local.values
  atomic           = true
  wait             = true
  timeout          = var.timeout_s
  max_history      = 10
}
