import pytest

pytest.importorskip('triton', reason='no Triton for this platform')
