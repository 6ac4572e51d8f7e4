"""Every probe keeps the contract of probes."""

import pytest

from secateur.core.sockets import find, names
from secateur.testing import check_probe


@pytest.mark.parametrize("name", names("probes"))
def test_every_probe_keeps_the_contract(name):
    check_probe(find("probes", name)())
