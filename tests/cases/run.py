#!/usr/bin/env python3
"""Cases from users' files: each builds a small input, runs one command, and compares with the right value.

    run.py CASES.json... --bin FOLDER_OF_CORRAL --models tests/golden/models [--only NAME] [--keep FOLDER] [-v]

A case:
  name, why      what is tried; the kind of fault that it stands for
  model          a golden model, copied without its golden values ("max_position_embeddings" raised to 1024)
  template       its chat template
  edit           {file: {key: value}} merged into a JSON file of the model; a null removes the key
  files          {name: records or text} beside the model ("@x" in a command is that file, "@model" the folder); {"hex": "..."} is
                 raw bytes; {"lm_head_plus": X} gives a safetensors file an lm_head that is the embedding plus X
  links          {path: target} symbolic links, made last
  config         a configuration, written to config.yaml ("@config")
  prepare        a script for bash, run in the case's folder before the command; $CORRAL and $LAUNCH are the binaries
  run            the command after `corral --device cpu`; or
  script         a script for bash in its place; its output and exit code are compared
  want           supervised: texts between the marks of `check`, in order (of the first examples shown)
                 contains / absent: in standard output;  completions: of out.jsonl, in order;  scores: its sum_logprob, to 2e-3
                 ids: its token_ids;  stderr: words that must be on standard error (a warning);  quiet: words that must not
                 rc: exit code (default 0)
  or_refused     a word: exit code 2 or 3 with that word on standard error passes, too
Exit code: the number of cases that fail.
"""
import argparse
import array
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile


def build(case, folder, models):
    if "model" in case:
        shutil.copytree(f"{models}/{case['model']}", f"{folder}/model", ignore=shutil.ignore_patterns("golden*"))
        case.setdefault("edit", {}).setdefault("config.json", {}).setdefault("max_position_embeddings", 1024)
    for file, keys in case.get("edit", {}).items():
        path = f"{folder}/model/{file}"
        values = json.load(open(path)) if os.path.exists(path) else {}
        for key, value in keys.items():
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value
        json.dump(values, open(path, "w"), indent=1)
    if "template" in case:
        open(f"{folder}/model/chat_template.jinja", "w").write(case["template"])
        path = f"{folder}/model/tokenizer_config.json"
        values = json.load(open(path))
        values.pop("chat_template", None)
        json.dump(values, open(path, "w"))
    for file, content in case.get("files", {}).items():
        path = f"{folder}/{file}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(content, dict) and "hex" in content:
            open(path, "wb").write(bytes.fromhex(content["hex"]))
        elif isinstance(content, dict) and "lm_head_plus" in content:
            other_head(path, content["lm_head_plus"])
        elif isinstance(content, str):
            open(path, "w").write(content)
        else:
            open(path, "w").write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in content))
    for path, target in case.get("links", {}).items():
        path = f"{folder}/{path}"
        if os.path.lexists(path):
            os.remove(path)
        os.symlink(target, path)


def other_head(path, add):
    """model.safetensors gets an lm_head.weight that is the embedding plus `add` in the first column."""
    data = open(path, "rb").read()
    n = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    embedding = header["model.embed_tokens.weight"]
    assert embedding["dtype"] == "F32"
    x = array.array("f", body[slice(*embedding["data_offsets"])])
    for i in range(0, len(x), embedding["shape"][1]):
        x[i] += add * (1 + i % 7)
    offsets = [len(body), len(body) + 4 * len(x)]
    header["lm_head.weight"] = {"dtype": "F32", "shape": embedding["shape"], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    open(path, "wb").write(struct.pack("<Q", len(text)) + text + body + x.tobytes())


def fill(value, folder):
    """The value with its "@name" made paths in the case's folder."""
    if isinstance(value, str):
        name = lambda m: f"{folder}/config.yaml" if m[1] == "config" else f"{folder}/{m[1]}"
        return re.sub(r"@([\w./-]+)", name, value)
    if isinstance(value, list):
        return [fill(v, folder) for v in value]
    if isinstance(value, dict):
        return {k: fill(v, folder) for k, v in value.items()}
    return value


def compare(case, folder, result):
    """Why the case fails, or None."""
    want, err = case["want"], result.stderr
    # Comments of `check` explain the marks.
    out = "".join(line for line in result.stdout.splitlines(True) if not line.startswith("#"))
    tail = err.strip()[-600:]
    if case.get("or_refused") and result.returncode in (2, 3):
        word = case["or_refused"]
        return None if word.lower() in err.lower() else f"refused without the word {word!r}: {tail}"
    if result.returncode != want.get("rc", 0):
        return f"exit code {result.returncode}: {tail}"
    if "supervised" in want:
        got = re.findall(r"⟦(.*?)⟧", out, re.S)[: len(want["supervised"])]
        if got != want["supervised"]:
            return f"supervised {got}, right {want['supervised']}"
    for text in want.get("contains", []):
        if text not in out:
            return f"not in the output: {text!r}"
    for text in want.get("absent", []):
        if text in out:
            return f"in the output: {text!r}"
    for text in want.get("stderr", []):
        if text.lower() not in err.lower():
            return f"not on standard error: {text!r}: {tail}"
    for text in want.get("quiet", []):
        if text.lower() in err.lower():
            return f"on standard error: {text!r}: {tail}"
    path = f"{folder}/out.jsonl"
    rows = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
    if "completions" in want:
        got = [row.get("completion") for row in rows]
        if got != want["completions"]:
            return f"completions {got}, right {want['completions']}"
    if "scores" in want:
        got = [row.get("sum_logprob") for row in rows]
        near = len(got) == len(want["scores"]) and all(
            g is not None and abs(g - s) <= 2e-3 for g, s in zip(got, want["scores"])
        )
        if not near:
            return f"sum_logprob {got}, right {want['scores']}"
    if "ids" in want:
        got = [row.get("token_ids") for row in rows]
        if got != want["ids"]:
            return f"token ids {got}, right {want['ids']}"
    return None


def run(case, folder, args):
    """Why the case fails, or None."""
    build(case, folder, args.models)
    case = {k: v if k in ("files", "template") else fill(v, folder) for k, v in case.items()}
    if "config" in case:
        json.dump(case["config"], open(f"{folder}/config.yaml", "w"), indent=1)
    corral, launch = f"{args.bin}/corral", f"{args.bin}/launch"
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", COLUMNS="200", CORRAL=corral, LAUNCH=launch)
    env["CASES"] = os.path.dirname(os.path.abspath(__file__))

    def start(command):
        result = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )
        if args.v:
            print(result.stdout, result.stderr)
        return result

    if "prepare" in case:
        result = start(["bash", "-euc", case["prepare"]])
        if result.returncode != 0:
            return f"prepare: exit code {result.returncode}: {result.stderr.strip()[-600:]}"
    if "script" in case:
        return compare(case, folder, start(["bash", "-uc", case["script"]]))
    return compare(case, folder, start([corral, "--device", "cpu", *case["run"]]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--bin", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--only")
    parser.add_argument("--keep")
    parser.add_argument("-v", action="store_true")
    args = parser.parse_args()
    args.bin = os.path.abspath(args.bin)
    bad = n = 0
    for case in [case for path in args.cases for case in json.load(open(path))]:
        if args.only and args.only not in case["name"]:
            continue
        n += 1
        folder = os.path.join(os.path.abspath(args.keep), case["name"].replace("/", "-")) if args.keep else tempfile.mkdtemp()
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        try:
            why = run(case, folder, args)
        except Exception as e:
            why = f"{type(e).__name__}: {e}"
        finally:
            if not args.keep:
                shutil.rmtree(folder, ignore_errors=True)
        bad += why is not None
        print(f"{'FAILS' if why else 'right'}  {case['name']}" + (f": {why}" if why else ""), flush=True)
    print(f"{n - bad} of {n} right")
    sys.exit(min(bad, 100))


main()
