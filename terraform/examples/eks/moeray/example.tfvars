# Beside cluster.auto.tfvars.json, which ../cluster writes.
model = "my-model"
# values_files = ["values.yaml"]
