mock_provider "aws" {
  source = "../../mocks/aws"
}

variables {
  cluster_name      = "moeray"
  name              = "experts"
  pool              = "experts"
  vpc_id            = "vpc-1"
  subnet_ids        = ["subnet-1"]
  security_group_id = "sg-1"
  node_role_arn     = "arn:aws:iam::000000000000:role/mock"
  kms_key_arn       = "arn:aws:kms:us-east-1:000000000000:key/mock"
  instance_type     = "p5.48xlarge"
  num_nodes         = { min = 0, max = 4 }
}

run "an_empty_pool_can_be_found_by_worker_group_and_autoscaler" {
  assert {
    condition     = aws_eks_node_group.this.labels == tomap(output.scheduling.nodeSelector)
    error_message = "the worker group's node selector must match the nodes' labels"
  }
  assert {
    condition = [for t in aws_eks_node_group.this.taint : "${t.key}=${t.value}:${t.effect}"] == ["nvidia.com/gpu=present:NO_SCHEDULE"] && [
      for t in output.scheduling.tolerations : "${t.key}=${t.value}:${t.effect}"
    ] == ["nvidia.com/gpu=present:NoSchedule"]
    error_message = "the worker group must tolerate the nodes' taint"
  }
  assert {
    condition = alltrue([
      aws_autoscaling_group_tag.autoscaler["k8s.io/cluster-autoscaler/node-template/label/moeray.io/pool"].tag[0].value == "experts",
      aws_autoscaling_group_tag.autoscaler["k8s.io/cluster-autoscaler/node-template/resources/nvidia.com/gpu"].tag[0].value == "8",
    ])
    error_message = "an autoscaler must know label and GPUs of a pool without nodes"
  }
  assert {
    condition     = aws_eks_node_group.this.scaling_config[0].desired_size == 0 && aws_eks_node_group.this.capacity_type == "ON_DEMAND"
    error_message = "a pool starts with its minimum, on demand"
  }
  assert {
    condition = alltrue([
      aws_launch_template.this.metadata_options[0].http_tokens == "required",
      aws_launch_template.this.metadata_options[0].http_put_response_hop_limit == 1,
      aws_launch_template.this.block_device_mappings[0].ebs[0].encrypted == "true",
      aws_launch_template.this.block_device_mappings[0].ebs[0].kms_key_id == var.kms_key_arn,
    ])
    error_message = "IMDSv2 with one hop, encrypted disks"
  }
  assert {
    condition     = strcontains(base64decode(aws_launch_template.this.user_data), "\"strategy\": \"RAID0\"")
    error_message = "NVMe disks are joined"
  }
}

run "efa_gives_every_card_an_interface_and_its_own_security_group" {
  command = plan
  variables {
    efa             = true
    placement_group = true
  }
  assert {
    condition     = length(aws_launch_template.this.network_interfaces) == 32 && output.scheduling.resources["vpc.amazonaws.com/efa"] == "32"
    error_message = "p5.48xlarge has 32 EFA interfaces"
  }
  assert {
    condition     = [for n in aws_launch_template.this.network_interfaces : n.device_index] == concat([0], [for _ in range(31) : 1])
    error_message = "card 0 carries the node's address, the others are second devices"
  }
  assert {
    condition     = alltrue([for n in aws_launch_template.this.network_interfaces : n.interface_type == (n.network_card_index == 0 ? "efa" : "efa-only")])
    error_message = "only card 0 takes an address"
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.efa[0].ip_protocol == "-1" && aws_vpc_security_group_ingress_rule.efa[0].cidr_ipv4 == null
    error_message = "everything, but only from the group itself"
  }
  assert {
    condition     = aws_placement_group.this[0].strategy == "cluster" && aws_launch_template.this.placement[0].group_name == aws_placement_group.this[0].name
    error_message = "nodes lie close together"
  }
}

run "reserved_capacity_is_targeted" {
  command = plan
  variables {
    purchase                = "capacity-block"
    capacity_reservation_id = "cr-0123456789abcdef0"
  }
  assert {
    condition = alltrue([
      aws_eks_node_group.this.capacity_type == "CAPACITY_BLOCK",
      aws_launch_template.this.instance_market_options[0].market_type == "capacity-block",
      aws_launch_template.this.capacity_reservation_specification[0].capacity_reservation_target[0].capacity_reservation_id == "cr-0123456789abcdef0",
    ])
    error_message = "a capacity block is asked for by its reservation"
  }
}

run "experts_may_be_spot" {
  command = plan
  variables { purchase = "spot" }
  assert {
    condition     = aws_eks_node_group.this.capacity_type == "SPOT"
    error_message = "spot"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    cluster_name      = "arn:aws:eks:us-east-1:000000000000:cluster/moeray"
    vpc_id            = "10.0.0.0/16"
    security_group_id = "default"
    node_role_arn     = "node"
    name              = "x_y"
    pool              = "ingress"
    kms_key_arn       = "key"
    instance_type     = "m7i.4xlarge"
    gpus_per_node     = 3
    num_nodes         = { min = 2, max = 1 }
    disk_gib          = 20
    labels            = { "moeray.io/pool" = "attention" }
  }
  expect_failures = [
    var.cluster_name, var.vpc_id, var.security_group_id, var.node_role_arn,
    var.name, var.pool, var.kms_key_arn, var.instance_type, var.gpus_per_node, var.num_nodes, var.disk_gib, var.labels,
  ]
}

run "values_that_contradict_each_other_are_named" {
  command = plan
  variables {
    pool          = "attention"
    purchase      = "spot"
    efa           = true
    instance_type = "g6e.48xlarge"
    num_nodes     = { min = 0, max = 1, desired = 2 }
  }
  expect_failures = [var.purchase, var.efa_interfaces, var.num_nodes]
}

# A value that is checked against another one is looked at only where that one is good: hence runs of their own.

run "unknown_purchase_and_interfaces_without_efa_are_named" {
  command = plan
  variables {
    purchase       = "cheap"
    efa_interfaces = 4
  }
  expect_failures = [var.purchase, var.efa_interfaces]
}

run "a_reservation_lies_in_one_zone_and_has_an_id" {
  command = plan
  variables {
    purchase                = "reservation"
    capacity_reservation_id = "block-1"
    subnet_ids              = ["subnet-1", "subnet-2"]
  }
  expect_failures = [var.capacity_reservation_id, var.subnet_ids]
}

run "reservation_without_its_id_is_named" {
  command = plan
  variables { purchase = "reservation" }
  expect_failures = [var.capacity_reservation_id]
}
