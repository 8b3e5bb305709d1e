"""`/v1/models`, and ListModels: a tenant sees what it may ask for."""

from __future__ import annotations

from typing import Any

from moeray.ingress.tenants.call import current_call


def show_only_own(models: Any) -> None:
    """Make vLLM's OpenAIServingModels answer for the tenant whose call it is; nobody sees none."""
    show_all = models.show_available_models

    async def show_own() -> Any:
        listed, call = await show_all(), current_call()
        listed.data = [card for card in listed.data if call is not None and call.tenant.may_use(card.id)]
        return listed

    models.show_available_models = show_own
