import torch

from calibrate.activations import BATCH_TOKENS, Download, batches_of, hold, upload

CPU = torch.device("cpu")


def test_batches_hold_as_many_windows_as_their_tokens_allow_and_only_the_last_is_smaller():
    windows = torch.arange(7 * 1500).view(7, 1500)
    batches = batches_of(windows, CPU)
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(batches), windows)


def test_a_window_longer_than_a_batch_is_a_batch():
    assert [len(batch) for batch in batches_of(torch.zeros(3, BATCH_TOKENS["cpu"] + 5), CPU)] == [1, 1, 1]


def test_held_states_are_copies_that_go_up_unchanged_and_take_results_back():
    states = torch.randn(2, 3, 5)
    held = hold(states, CPU)
    assert torch.equal(held, states)
    assert held.data_ptr() != states.data_ptr()
    (uploaded,) = upload([held], CPU)
    with Download(CPU) as download:
        download.copy(uploaded + 1, held)
    assert torch.equal(held, states + 1)
