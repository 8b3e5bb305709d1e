output "release" {
  description = "Name, namespace and status of the release."
  value = {
    name      = helm_release.moeray.name
    namespace = helm_release.moeray.namespace
    status    = helm_release.moeray.status
  }
}
