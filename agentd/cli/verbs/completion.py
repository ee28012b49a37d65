"""`agentctl completion`: small scripts that leave the thinking to `agentctl _complete`."""

from __future__ import annotations

from agentd.cli.call import Call, Parser

EXAMPLES = """
source <(agentctl completion bash)     for this shell; in ~/.bashrc for every one
agentctl completion zsh > "${fpath[1]}/_agentctl"
agentctl completion fish > ~/.config/fish/completions/agentctl.fish
"""

BASH = """\
# bash completion for agentctl. Where it offers nothing, bash completes file names (-o default).
_agentctl() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("${line%%$'\\t'*}")
    done < <("${COMP_WORDS[0]}" _complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _agentctl agentctl
"""

ZSH = """\
#compdef agentctl
# zsh completion for agentctl. Where it offers nothing, files are completed.
_agentctl() {
    local line
    local -a found
    while IFS= read -r line; do
        found+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}")
    done < <("${words[1]}" _complete -- "${(@)words[2,$CURRENT]}" 2>/dev/null)
    if (( ${#found} )); then
        _describe agentctl found
    else
        _files
    fi
}
if [[ "${funcstack[1]}" == _agentctl ]]; then
    _agentctl "$@"
else
    compdef _agentctl agentctl
fi
"""

FISH = """\
# fish completion for agentctl. Where it offers nothing, files are completed.
function __agentctl_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found (command agentctl _complete -- $words[2..-1] "$current" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c agentctl -f -a '(__agentctl_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def arguments(parser: Parser) -> None:
    """Which shell."""
    parser.add_argument("shell", choices=tuple(SCRIPTS), metavar="bash|zsh|fish", help="the shell that will read it")


def run(call: Call) -> int:
    """Prints the script."""
    script = SCRIPTS[call.args.shell]
    if call.json:
        call.out.document({"shell": call.args.shell, "script": script})
    else:
        call.out.stream.write(script)
        call.out.stream.flush()
    return 0
