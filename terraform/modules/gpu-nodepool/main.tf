# GPU nodes of one pool (attention or experts) as an EKS managed node group.
#
# `purchase` says how the capacity is paid: on demand, spot, an on-demand capacity reservation or a capacity block.
# `placement_group` puts the nodes close together, `efa` gives them the network that NCCL and DeepEP need between
# nodes; both keep the pool in one zone. Nodes carry the label `moeray.io/pool` and the taint `nvidia.com/gpu`; output
# `scheduling` has the matching node selector and tolerations for the chart's worker group. The node image holds the
# driver; the device plugins (nvidia.com/gpu, vpc.amazonaws.com/efa) are the cluster operator's to install.

locals {
  fullname = "${var.cluster_name}-${var.name}"

  # Network cards with EFA per instance type, from AWS's tables. Others: `efa_interfaces`.
  efa_cards = {
    "p4d.24xlarge"     = 4
    "p4de.24xlarge"    = 4
    "p5.48xlarge"      = 32
    "p5e.48xlarge"     = 32
    "p5en.48xlarge"    = 16
    "p6-b200.48xlarge" = 8
  }
  num_efa = var.efa ? coalesce(var.efa_interfaces, lookup(local.efa_cards, var.instance_type, 0)) : 0

  # One taint, not one per pool: the device plugins' daemon sets tolerate it as they are published.
  gpu_taint = "nvidia.com/gpu"
  reserved  = contains(["reservation", "capacity-block"], var.purchase)
  arm       = startswith(var.instance_type, "p6e-") || startswith(var.instance_type, "g5g.")
  labels    = merge(var.labels, { "moeray.io/pool" = var.pool })

  node_config = yamlencode({
    apiVersion = "node.eks.aws/v1alpha1"
    kind       = "NodeConfig"
    spec       = { instance = { localStorage = { strategy = "RAID0" } } }
  })
  user_data = join("\n", [
    "MIME-Version: 1.0",
    "Content-Type: multipart/mixed; boundary=\"NODE\"",
    "",
    "--NODE",
    "Content-Type: application/node.eks.aws",
    "",
    local.node_config,
    "--NODE--",
    "",
  ])

  # What an autoscaler must know of a group that has no node to look at.
  autoscaler_tags = merge(
    {
      "k8s.io/cluster-autoscaler/enabled"                                    = "true"
      "k8s.io/cluster-autoscaler/${var.cluster_name}"                        = "owned"
      "k8s.io/cluster-autoscaler/node-template/taint/${local.gpu_taint}"     = "present:NoSchedule"
      "k8s.io/cluster-autoscaler/node-template/resources/${local.gpu_taint}" = tostring(var.gpus_per_node)
    },
    { for key, value in local.labels : "k8s.io/cluster-autoscaler/node-template/label/${key}" => value },
    local.num_efa == 0 ? {} : {
      "k8s.io/cluster-autoscaler/node-template/resources/vpc.amazonaws.com/efa" = tostring(local.num_efa)
    },
  )
}

resource "aws_placement_group" "this" {
  count    = var.placement_group ? 1 : 0
  name     = local.fullname
  strategy = "cluster"
}

# --- EFA: its traffic passes only between members of one group that lets everything through to itself ---------------

resource "aws_security_group" "efa" {
  count       = var.efa ? 1 : 0
  name_prefix = "${local.fullname}-efa-"
  description = "EFA between the nodes of one moeray pool"
  vpc_id      = var.vpc_id
  lifecycle { create_before_destroy = true }
}

resource "aws_vpc_security_group_ingress_rule" "efa" {
  count                        = var.efa ? 1 : 0
  security_group_id            = aws_security_group.efa[0].id
  referenced_security_group_id = aws_security_group.efa[0].id
  description                  = "EFA from this pool"
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "efa" {
  count                        = var.efa ? 1 : 0
  security_group_id            = aws_security_group.efa[0].id
  referenced_security_group_id = aws_security_group.efa[0].id
  description                  = "EFA to this pool"
  ip_protocol                  = "-1"
}

# --- nodes ----------------------------------------------------------------------------------------------------------

resource "aws_launch_template" "this" {
  name_prefix            = "${local.fullname}-"
  update_default_version = true
  instance_type          = var.instance_type
  user_data              = var.local_nvme ? base64encode(local.user_data) : null
  vpc_security_group_ids = var.efa ? null : [var.security_group_id]

  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_type           = "gp3"
      volume_size           = var.disk_gib
      encrypted             = true
      kms_key_id            = var.kms_key_arn
      delete_on_termination = true
    }
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  dynamic "network_interfaces" {
    # Card 0 carries the node's address; the others carry EFA alone and take no address. Nothing is said of public
    # addresses: EC2 refuses that for several interfaces, and the private subnets give none.
    for_each = range(local.num_efa)
    content {
      network_card_index    = network_interfaces.value
      device_index          = network_interfaces.value == 0 ? 0 : 1
      interface_type        = network_interfaces.value == 0 ? "efa" : "efa-only"
      delete_on_termination = true
      security_groups       = [var.security_group_id, aws_security_group.efa[0].id]
    }
  }

  dynamic "placement" {
    for_each = aws_placement_group.this
    content {
      group_name = placement.value.name
    }
  }

  dynamic "instance_market_options" {
    for_each = var.purchase == "capacity-block" ? [1] : []
    content {
      market_type = "capacity-block"
    }
  }

  dynamic "capacity_reservation_specification" {
    for_each = local.reserved ? [var.capacity_reservation_id] : []
    content {
      capacity_reservation_target {
        capacity_reservation_id = capacity_reservation_specification.value
      }
    }
  }
}

resource "aws_eks_node_group" "this" {
  cluster_name    = var.cluster_name
  node_group_name = local.fullname
  node_role_arn   = var.node_role_arn
  subnet_ids      = var.subnet_ids
  ami_type        = local.arm ? "AL2023_ARM_64_NVIDIA" : "AL2023_x86_64_NVIDIA"
  capacity_type   = lookup({ spot = "SPOT", capacity-block = "CAPACITY_BLOCK" }, var.purchase, "ON_DEMAND")
  labels          = local.labels

  launch_template {
    id      = aws_launch_template.this.id
    version = aws_launch_template.this.latest_version
  }

  scaling_config {
    min_size     = var.num_nodes.min
    max_size     = var.num_nodes.max
    desired_size = coalesce(var.num_nodes.desired, var.num_nodes.min)
  }

  taint {
    key    = local.gpu_taint
    value  = "present"
    effect = "NO_SCHEDULE"
  }

  update_config {
    # A pool loses one node at a time; its experts' copies lie on others.
    max_unavailable = 1
  }

  node_repair_config {
    enabled = true
  }

  lifecycle {
    # An autoscaler owns the number of nodes once the group exists.
    ignore_changes = [scaling_config[0].desired_size]
  }
}

resource "aws_autoscaling_group_tag" "autoscaler" {
  for_each               = local.autoscaler_tags
  autoscaling_group_name = aws_eks_node_group.this.resources[0].autoscaling_groups[0].name
  tag {
    key                 = each.key
    value               = each.value
    propagate_at_launch = false
  }
}
