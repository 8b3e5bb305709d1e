output "release" {
  description = "The Helm release."
  value       = module.moeray.release
}
