mock_provider "aws" {
  source = "../../mocks/aws"
}

variables {
  name = "moeray"
}

run "key_rotates_and_only_services_of_this_account_are_named" {
  assert {
    condition     = aws_kms_key.this.enable_key_rotation && aws_kms_key.this.deletion_window_in_days == 30
    error_message = "the key must rotate, and be recoverable for 30 days"
  }
  assert {
    condition = alltrue([
      for s in jsondecode(aws_kms_key.this.policy).Statement :
      s.Principal != "*" && (try(s.Principal.AWS, "") != "*" || try(
        s.Condition.StringEquals["kms:CallerAccount"] == "000000000000" && strcontains(s.Condition.ArnLike["aws:PrincipalArn"], ":role/aws-service-role/"),
        false,
      ))
    ])
    error_message = "the key's policy must name whom it lets in: a principal, or one service's role of this account"
  }
  assert {
    condition     = [for s in jsondecode(aws_kms_key.this.policy).Statement : s.Sid if s.Action == "kms:*"] == ["AccountDecidesByIam"]
    error_message = "only the account itself may administer the key"
  }
  assert {
    condition = alltrue([
      for s in jsondecode(aws_kms_key.this.policy).Statement : try(s.Condition.Bool["kms:GrantIsForAWSResource"], "") == "true"
      if s.Action == "kms:CreateGrant"
    ])
    error_message = "grants are for disks only"
  }
}

run "bad_values_are_named" {
  command = plan
  variables {
    name                 = "Bad_Name"
    deletion_window_days = 3
  }
  expect_failures = [var.name, var.deletion_window_days]
}
