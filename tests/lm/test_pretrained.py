import pytest

from gemma_ext.lm.pretrained import read_pretrained


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_a_model_that_is_not_there_is_one_sentence(kind):
    class Auto:
        @staticmethod
        def from_pretrained(name, **options):
            assert (name, options) == ("nowhere", {"dtype": "auto"})
            raise kind("no such file\nand a page about hubs")

    with pytest.raises(ValueError, match=r"^model: expected a folder, got nowhere: no such file$"):
        read_pretrained(Auto, "nowhere", "model: expected a folder", dtype="auto")
