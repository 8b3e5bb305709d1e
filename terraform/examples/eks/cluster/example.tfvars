# An example, not a recommendation: two attention nodes that stay, and experts in one placement group with EFA.
region = "us-east-1"
zones  = ["us-east-1a", "us-east-1b"]

admin_role_arns = { platform = "arn:aws:iam::000000000000:role/platform" } # yours
# private_access_cidrs = ["10.8.0.0/16"]                                   # your VPN

pools = {
  attention = {
    instance_type = "p5.48xlarge"
    zone          = "us-east-1a"
    num_nodes     = { min = 2, max = 4 }
    efa           = true
  }
  experts = {
    instance_type   = "p5.48xlarge"
    zone            = "us-east-1a"
    num_nodes       = { min = 2, max = 8 }
    placement_group = true
    efa             = true
  }
}
