"""`slsgu env`: what bug reports need."""

import json

from processes import inside

import slsgu_cli


def test_env_prints_the_data_of_a_bug_report():
    said = json.loads(inside("env", "--json").stdout)
    versions = {each["package"]: each["version"] for each in said["versions"]}
    assert versions["slsgu"] == slsgu_cli.__version__
    assert "missing" not in versions.values()
    assert {each["extra"] for each in said["extras"]} == {"targets", "s3", "download"}
