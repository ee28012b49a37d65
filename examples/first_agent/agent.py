"""A small agent that knows nothing of agentd: the official OpenAI SDK, a document, a report, a memory.

`OpenAI()` finds the proxy through OPENAI_BASE_URL and OPENAI_API_KEY. Memory and progress are plain HTTP at AGENTD_URL; outside agentd
(no AGENTD_URL) the same program runs without them.
"""

import json
import os
import pathlib
import socket
import sys
import urllib.error
import urllib.request

from openai import OpenAI

BASE = os.environ.get("AGENTD_URL")
FORBIDDEN = ("example.com", 443)


def agentd(method, path, body=None):
    """One call of the agent API; None where there is no agentd or nothing is kept under that name."""
    if not BASE:
        return None
    headers = {"Authorization": f"Bearer {os.environ['AGENTD_TOKEN']}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(BASE + path, data, headers, method=method), timeout=30
        ) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def progress(text, fraction):
    print(text, flush=True)
    agentd("POST", "/v1/task/progress", {"text": text, "fraction": fraction})


def main():
    document = pathlib.Path("document.md").read_text()
    progress(f"read document.md: {len(document.split())} words", 0.1)

    before = agentd("GET", "/v1/memory/user/first-agent/last")
    if before:
        print(f"I remember: in run {before['run']} I wrote: {before['summary'][:120]}…", flush=True)
    else:
        print("I remember nothing: this is the first run.", flush=True)

    client = OpenAI()
    model = os.environ.get("OPENAI_MODEL") or client.models.list().data[0].id
    progress(f"asking the model {model}", 0.4)
    pieces = []
    with client.chat.completions.create(
        model=model,
        temperature=0,
        stream=True,
        messages=[
            {"role": "system", "content": "You summarise documents in three sentences."},
            {"role": "user", "content": f"Summarise this document.\n\n{document}"},
        ],
    ) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
    summary = "".join(pieces).strip()

    progress("trying to reach a host that is not allowed", 0.7)
    for host, port in (FORBIDDEN, ("192.0.2.1", 443)):
        try:
            socket.create_connection((host, port), timeout=5).close()
            print(f"  {host}:{port}: reached", flush=True)
        except OSError as error:
            print(f"  {host}:{port}: stopped ({error})", flush=True)

    run = (before or {}).get("run", 0) + 1
    pathlib.Path("report.md").write_text(f"# Report {run}\n\nModel: {model}\n\n{summary}\n")
    progress("wrote report.md", 0.9)
    agentd("PUT", "/v1/memory/user/first-agent/last", {"run": run, "summary": summary})
    agentd("PUT", "/v1/result", {"text": summary, "report": "report.md", "run": run})
    return 0


if __name__ == "__main__":
    sys.exit(main())
