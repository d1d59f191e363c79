"""The stand-in Hub refuses, lists and breaks connections as its unmodified client expects."""

import json

import pytest
from hub_stub import HubStub

CLIENT = """
import json, os, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HTTPError

api, repo = HfApi(), {"repo_id": "tester/set", "repo_type": "dataset"}
seen = {}

def status(name, call, **kwargs):
    try:
        call(**kwargs)
    except HfHubHTTPError as error:
        seen[name] = [error.response.status_code, error.server_message]
    except HTTPError as error:
        seen[name] = [0, type(error).__name__]
    else:
        seen[name] = [200, None]

def files(**folders):
    return [CommitOperationAdd(path.replace("__", "/"), content) for path, content in folders.items()]

def commit(**kwargs):
    return api.create_commit(**repo | {"commit_message": "more"} | kwargs)

api.create_repo(**repo)
status("create again", api.create_repo, **repo)
status("create elsewhere", api.create_repo, repo_id="other/set", repo_type="dataset")
first = api.repo_info(**repo).sha
commit(operations=files(a=b"a", data__b=b"0123456789" * 2, data__deep__c=b"c"), parent_commit=first)
status("stale parent", commit, operations=files(a=b"b"), parent_commit=first)
for name in ("tester/cut-request", "tester/cut-answer"):
    api.create_repo(name, repo_type="dataset")
    status(name, commit, repo_id=name, operations=files(a=b"a"))

seen["flat"] = [entry.path for entry in api.list_repo_tree(**repo)]
seen["data"] = [entry.path for entry in api.list_repo_tree(**repo, path_in_repo="data")]
seen["deep"] = sorted(entry.path for entry in api.list_repo_tree(**repo, recursive=True))
seen["paths"] = [[type(e).__name__, e.path] for e in api.get_paths_info(**repo, paths=["a", "data", "none"])]
seen["glob"] = HfFileSystem().glob("datasets/tester/set/data/**")
seen["size"] = HfFileSystem().info("datasets/tester/set/data/b")["size"]
seen["part"] = HfFileSystem().cat_file("datasets/tester/set/data/b", start=8, end=12).decode()

api.create_branch(**repo, branch="try")
status("branch again", api.create_branch, **repo, branch="try")
request = commit(operations=files(p=b"p") + [CommitOperationDelete("data/", is_folder=True)], create_pr=True)
seen["request"] = [request.pr_url, request.pr_revision]
seen["main"], seen["requested"] = (api.list_repo_files(**repo, revision=r) for r in ("main", "refs/pr/1"))
refs = api.list_repo_refs(**repo)
seen["branches"] = [ref.name for ref in refs.branches]

secret = {"repo_id": "tester/secret", "repo_type": "dataset"}
api.create_repo(**secret, private=True)
seen["private"] = [api.repo_info(**repo).private, api.repo_info(**secret).private]
for token in (False, "hf_read", "hf_wrong"):
    status(f"see with {token}", api.repo_info, **secret, token=token)
    status(f"write with {token}", api.create_branch, **secret, branch="b", token=token)
space = {"repo_id": "tester/space", "repo_type": "space"}
status("space of no kind", api.create_repo, **space, space_sdk="static", token="hf_read")
api.create_repo(**space, space_sdk="static")
seen["sdk"] = [api.repo_info(**space).sdk]
card = "---\\nsdk: {}\\ncolorFrom: {}\\nshort_description: {}\\n---\\n"

def commit_card(*values):
    api.create_commit(**space, operations=files(README=b"", app=b"app") + [
        CommitOperationAdd("README.md", card.format(*values).encode())], commit_message="page")

for values in (("docker", "blue", "x" * 61), ("gradio", "beige", "x"), ("abacus", "blue", "x")):
    try:
        commit_card(*values)
    except ValueError as error:
        seen[values[0] + " card"] = str(error)
commit_card("gradio", "blue", "A page")
seen["sdk"].append(api.repo_info(**space).sdk)
seen["space files"] = sorted(api.list_repo_files(**space))
with open(api.hf_hub_download(**space, filename="app")) as file:
    seen["app"] = file.read()
json.dump(seen, sys.stdout)
"""


@pytest.fixture(scope="module")
def hub():
    with HubStub(lfs_over=10) as stub:
        yield stub


@pytest.fixture(scope="module")
def seen(hub, run_child, tmp_path_factory):
    hub.cut("POST .*/cut-request/commit/")
    hub.cut("POST .*/cut-answer/commit/", "answer")
    return json.loads(run_child(CLIENT, **hub.environment(tmp_path_factory.mktemp("home"))))


def test_what_exists_and_what_is_not_ones_own_is_refused(seen):
    assert seen["create again"][0] == 409 and seen["branch again"][0] == 409
    assert seen["create elsewhere"] == [403, "You don't have the rights to write to other/set"]
    assert seen["stale parent"][0] == 412


def test_tokens_decide_what_is_seen_and_written(seen):
    assert seen["private"] == [False, True]
    assert seen["see with False"][0] == seen["write with False"][0] == 401
    assert (seen["see with hf_read"][0], seen["write with hf_read"][0]) == (200, 403)
    assert (
        seen["see with hf_wrong"]
        == seen["write with hf_wrong"]
        == [401, "Invalid credentials in Authorization header"]
    )


def test_a_cut_request_changes_nothing_and_a_cut_answer_all(seen, hub):
    assert seen["tester/cut-request"] == seen["tester/cut-answer"] == [0, "RemoteProtocolError"]
    assert hub.files("tester/cut-request", kind="datasets") == {}
    assert hub.files("tester/cut-answer", kind="datasets") == {"a": b"a"}
    assert [status for _, path, status in hub.log if "/cut-" in path and "/commit/" in path] == [0, 0]
    assert hub.cuts == []


def test_folders_are_listed_level_by_level(seen):
    assert sorted(seen["flat"]) == ["a", "data"]
    assert sorted(seen["data"]) == ["data/b", "data/deep"]
    assert seen["deep"] == ["a", "data", "data/b", "data/deep", "data/deep/c"]
    assert seen["paths"] == [["RepoFile", "a"], ["RepoFolder", "data"]]
    assert "datasets/tester/set/data/deep/c" in seen["glob"] and seen["size"] == 20


def test_a_part_of_a_file_is_read_without_the_rest(seen, hub):
    assert seen["part"] == "8901"
    assert [status for _, path, status in hub.log if path.endswith("/data/b")][-1] == 206


def test_a_pull_request_is_a_branch_of_its_own(seen, hub):
    assert seen["request"] == [f"{hub.url}/datasets/tester/set/discussions/1", "refs/pr/1"]
    assert sorted(seen["main"]) == ["a", "data/b", "data/deep/c"]
    assert sorted(seen["requested"]) == ["a", "p"]
    assert sorted(seen["branches"]) == ["main", "try"]


def test_a_space_has_an_sdk_and_a_card_that_is_checked(seen, hub):
    assert seen["space of no kind"][0] == 403
    assert seen["sdk"] == ["static", "gradio"]
    assert "less than or equal to 60 characters" in seen["docker card"]
    assert '"colorFrom" must be one of red,' in seen["gradio card"]
    assert '"sdk" must be one of gradio,' in seen["abacus card"]
    assert seen["space files"] == ["README", "README.md", "app"] and seen["app"] == "app"
    assert len(hub.repos["spaces", "tester/space"].commits) == 2
    assert ("models", "tester/space") not in hub.repos


def test_nothing_was_asked_of_the_hub_that_it_does_not_serve(seen, hub):
    assert not [entry for entry in hub.log if entry[2] == 501]
