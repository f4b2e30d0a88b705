"""Every check is declared, and its declaration names what there is."""

from dataclasses import fields

import pytest

from slsgu_cli.errors import MissingError
from slsgu_cli.records.verification import ATTACKED, Check, Finding, Settings, VerifyRequest
from slsgu_cli.verification import verify as verify_module
from slsgu_cli.verification.registry import spec_of
from slsgu_cli.verification.verify import verify

SETTINGS = {field.name for field in fields(Settings)}
FINDINGS = {field.name for field in fields(Finding)}


@pytest.mark.parametrize("check", Check)
def test_a_declaration_names_settings_and_a_field_of_findings(check):
    spec = spec_of(check)
    assert set(spec.settings) <= SETTINGS
    assert spec.fills in FINDINGS - {"check", "key", "settings", "skipped"}
    assert (spec.fills == "attempts") is (check in ATTACKED)
    assert spec.effort.format("how").count("how") == 1


def test_every_setting_belongs_to_a_check():
    assert {name for check in Check for name in spec_of(check).settings} == SETTINGS


def test_a_check_whose_package_is_not_installed_names_the_extra(shared_world, monkeypatch):
    monkeypatch.setattr(verify_module, "find_spec", lambda name: None)
    monkeypatch.setattr(verify_module, "load_source", lambda *_, **__: pytest.fail("loaded"))
    request = VerifyRequest(checks=(Check.PROBE, Check.AUGMENT), device="cpu")
    with pytest.raises(
        MissingError, match="not installed, which these checks need: probe"
    ) as error:
        verify(shared_world.store, shared_world.name, request)
    assert "pip install 'slsgu[verify]'" in error.value.hint
