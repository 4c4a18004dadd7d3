// The dashboard: reads the REST API with the bearer token, follows the event stream, shows what it is told.
// Text only ever enters the page as text nodes, so nothing that a job says can become markup.

const GLYPH = { QUEUED: "◌", STARTING: "◔", RUNNING: "●", STOPPING: "◑", SUCCEEDED: "✔", FAILED: "✖", CANCELLED: "⊘" };
const ENDED = ["SUCCEEDED", "FAILED", "CANCELLED"];
const $ = (id) => document.getElementById(id);

// ---- small tools ----

function h(tag, given = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function svg(tag, given, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(given)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const table = (heads, rows, empty) => rows.length
  ? h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))))
  : h("p", { class: "soft" }, empty);

const facts = (pairs) => h("dl", { class: "facts" },
  pairs.filter(([, value]) => value !== "" && value !== null).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));

const pill = (phase) => h("span", { class: `pill ${phase}` }, `${GLYPH[phase] ?? ""} ${phase}`);
const mark = (ok) => h("span", { class: `pill ${ok ? "ok" : "bad"}` }, ok ? "✔ ok" : "✖ problem");
const jobLink = (job) => h("a", { href: `#/job/${job.id}` }, job.name);
const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(0)} GiB`;

function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return s < 172800 ? `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min` : `${Math.floor(s / 86400)} d`;
}

const ago = (ms) => (ms ? h("time", { datetime: new Date(ms).toISOString(), title: new Date(ms).toISOString() }, `${span(Date.now() - ms)} ago`) : "");

function command(text) {
  const copy = async (event) => {
    await navigator.clipboard.writeText(text);
    event.target.textContent = "copied";
  };
  return h("span", { class: "command" }, h("code", {}, text), h("button", { type: "button", onclick: copy, "aria-label": `Copy: ${text}` }, "copy"));
}

// ---- talking to the server ----

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", `${location.pathname}#/overview`);
}

class Refused extends Error {}

async function ask(path, options = {}) {
  const response = await fetch(`/v1/${path}`, {
    ...options, headers: { Authorization: `Bearer ${sessionStorage.getItem("token") ?? ""}`, "Content-Type": "application/json", ...options.headers },
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) logIn(sessionStorage.getItem("token") ? body.message : "");
  throw new Refused([body.message ?? `HTTP ${response.status}`, body.hint].filter(Boolean).join(" — "));
}

const get = async (path, signal) => (await ask(path, { signal })).json();
const post = async (path, body = {}) => (await ask(path, { method: "POST", body: JSON.stringify(body) })).json();

function logIn(message) {
  if ($("login").open) return;
  $("login-error").textContent = message;
  $("login").showModal();
}

$("login").addEventListener("close", () => {
  if ($("token").value) sessionStorage.setItem("token", $("token").value.trim());
  $("token").value = "";
  follow();
  show();
});

// One server-sent event stream; calls back with (data, id), returns when the server ends it for good or `signal` fires, throws
// `Refused` when the server says what is wrong. `state` is told when the stream begins (again) and when it breaks off.
async function stream(path, signal, tell, state = () => {}) {
  let lastId = "";
  while (!signal.aborted) {
    try {
      const response = await ask(path, { signal, headers: lastId ? { "Last-Event-ID": lastId } : {} });
      state(true);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part; !(part = await reader.read()).done;) {
        const blocks = (rest + part.value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) {
          const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
          lastId = fields.id ?? lastId;
          if (fields.event === "end") return;
          if (!fields.data) continue;
          const data = JSON.parse(fields.data);
          if (fields.event === "error") throw new Refused([data.message, data.hint].filter(Boolean).join(" — "));
          tell(data, lastId);
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused) {
        state(false);
        throw error;
      }
    }
    state(false);
    await new Promise((wake) => setTimeout(wake, 1000));
  }
}

// ---- pages: each returns its content; `live` pages are made anew when something happened ----

const filters = { text: "", all: false };

async function overview(signal) {
  const [page, ended, nodes, queues, checks] = await Promise.all(
    ["jobs?limit=200", `jobs?limit=5&state=${ENDED}`, "nodes", "queues", "doctor"].map((path) => get(path, signal)));
  const here = nodes.filter((n) => n.state !== "lost");
  const total = here.reduce((sum, n) => sum + n.node.gpus.length, 0);
  const used = queues.reduce((sum, q) => sum + q.gpus_in_use, 0);
  const tile = (value, text) => h("div", { class: "tile" }, h("b", {}, String(value)), text);
  const bad = checks.filter((check) => !check.ok);
  return [
    h("h1", {}, "Overview"),
    h("div", { class: "tiles" },
      tile(queues.reduce((sum, q) => sum + q.active, 0), "active jobs"), tile(queues.reduce((sum, q) => sum + q.waiting, 0), "waiting jobs"),
      tile(`${used} / ${total}`, "GPUs in use"), tile(`${here.length} / ${nodes.length}`, "nodes present")),
    bad.length ? [h("h2", {}, "Needs attention"), checkTable(bad)] : "",
    h("h2", {}, "GPUs"), h("div", { class: "card nodes" }, here.slice(0, 64).map((n) => h("div", {}, n.node.name, gpus(n)))),
    h("h2", {}, "Live jobs"), jobTable(page.jobs, "Nothing waits or runs."), page.more ? h("p", {}, "… and more") : "",
    ended.jobs.length ? [h("h2", {}, "Ended last"), jobTable(ended.jobs)] : "",
    h("div", { class: "row" }, command("jobsched jobs")),
  ];
}

const jobTable = (answers, empty = "No jobs.") => table(["Job", "Phase", "Reason", "Queue", "Owner", "Attempt", "Progress", "Submitted"], answers.map(({ job, progress, headline }) => [
  [jobLink(job), h("br"), h("small", {}, job.id)], pill(job.phase), headline, job.spec.queue, job.owner,
  String(job.attempt), bar(progress), ago(job.submitted_at_ms),
]), empty);

const bar = (progress) => (progress && progress.step >= 0
  ? [progress.total > 0 ? h("progress", { value: progress.step, max: progress.total, "aria-label": "steps" }) : "",
     ` step ${progress.step}${progress.total > 0 ? ` of ${progress.total}` : ""}`]
  : "");

async function jobs(signal) {
  const page = await get(`jobs?limit=500${filters.all ? "&all=true" : ""}`, signal);
  const needle = filters.text.toLowerCase();
  const shown = page.jobs.filter(({ job }) => [job.name, job.id, job.owner, job.phase, job.spec.queue].some((text) => text.toLowerCase().includes(needle)));
  const typed = (event) => { filters.text = event.target.value; show(); };
  const toggled = (event) => { filters.all = event.target.checked; show(); };
  return [
    h("h1", {}, "Jobs"),
    h("div", { class: "row" },
      h("label", {}, "Filter ", h("input", { id: "filter", type: "search", value: filters.text, oninput: typed })),
      h("label", {}, h("input", { id: "all", type: "checkbox", checked: filters.all, onchange: toggled }), " ended ones, too"),
      command(`jobsched jobs${filters.all ? " -a" : ""}`)),
    jobTable(shown), page.more ? h("p", {}, "Only the newest 500 are shown.") : "",
  ];
}

const SPENT = { wait: "waiting", start: "starting", run: "running", stop: "stopping" };

function timeline(events, ended) {
  const bars = [], sums = {}, from = events[0].event.at_ms, to = Math.max(from + 1, events.at(-1).event.at_ms, ended ? 0 : Date.now());
  let since = from, kind = "wait";
  const next = { AttemptPlaced: "start", AttemptStarted: "run", AttemptStopping: "stop", AttemptEnded: "wait" };
  const put = (until) => { sums[kind] = (sums[kind] ?? 0) + until - since; bars.push(svg("rect", { class: `bar-${kind}`, x: (since - from) / (to - from) * 1000, y: 0, height: 22, width: Math.max(1, (until - since) / (to - from) * 1000) },
    svg("title", {}, document.createTextNode(`${SPENT[kind]} ${span(until - since)}`)))); };
  for (const { event } of events) {
    if (!(event.kind in next)) continue;
    put(event.at_ms);
    since = event.at_ms;
    kind = next[event.kind];
  }
  if (since < to) put(to);
  return [
    svg("svg", { viewBox: "0 0 1000 22", preserveAspectRatio: "none", role: "img", "aria-label": "Waiting, starting, running and stopping over time; the story below tells the same" }, ...bars),
    h("div", { class: "legend" }, Object.entries(sums).map(([was, ms]) => h("span", { class: `bar-${was}` }, `${SPENT[was]} ${span(ms)}`))),
  ];
}

function liveFacts({ job, progress, headline, verdict }, later) {
  const replicas = Object.values(job.replicas), known = new Map((progress?.replicas ?? []).map((r) => [`${r.role}/${r.index}`, r]));
  return [
    h("div", { class: "card" }, facts([
      ["Phase", [pill(job.phase), verdict?.reasons.length || job.cause ? "" : ` ${headline}`]], ["Progress", bar(progress)],
      ["Metrics", (progress?.metrics ?? []).map(([name, value]) => `${name} ${Number(value.toPrecision(5))}`).join(" · ")],
      ["Attempt", `${job.attempt}, ${job.restarts} restarts`], ["Queue", `${job.spec.queue}, priority ${job.priority}`],
      ["Owner", job.owner], ["Checkpoint", job.checkpoint ? `step ${job.checkpoint.step}, ${job.checkpoint.path}` : ""],
      ["Submitted", ago(job.submitted_at_ms)], ["Ended", ago(job.ended_at_ms)],
    ])),
    verdict?.reasons.length ? [h("h2", {}, "Why it waits"), h("div", { class: "card" }, h("ul", { class: "why" }, verdict.reasons.map((why) => h("li", {}, why.message, why.fix ? h("small", {}, ` — ${why.fix}`) : "")),
      later?.starts ? h("li", {}, `Expected start: ${later.starts}`) : "", (later?.sooner ?? []).map((way) => h("li", {}, `Sooner with ${way}`))))] : "",
    job.cause ? [h("h2", {}, ENDED.includes(job.phase) ? "Root cause" : "Last failure"), h("p", { class: "error" }, job.cause.message), job.cause.tail.length ? h("pre", {}, job.cause.tail.join("\n")) : ""] : "",
    replicas.length ? [h("h2", {}, "Replicas"), table(["Replica", "Rank", "Node", "State", "Restarts", "Step", "Last heard of"], replicas.map((r) => {
      const p = known.get(`${r.role}/${r.index}`) ?? {};
      return [`${r.role}/${r.index}`, p.rank >= 0 ? String(p.rank) : "", r.binding?.node ?? "", p.state || r.state, String(r.restart),
        p.step >= 0 ? String(p.step) : "", p.beat_age_ms >= 0 ? `${span(p.beat_age_ms)} ago` : ""];
    }), "")] : "",
  ];
}

async function job(signal, ref) {
  const [answer, why, events] = await Promise.all([get(`jobs/${ref}`, signal), get(`jobs/${ref}/why`, signal), get(`jobs/${ref}/events`, signal)]);
  const { id, name, phase } = answer.job, ended = ENDED.includes(phase), said = h("p", { class: "error", role: "alert" });
  const upper = h("div", {}, liveFacts(answer, why.verdict)), course = h("div", {}, timeline(events, ended)), story = h("pre", {}, why.story.join("\n")), lines = h("pre", { tabindex: "0", "aria-label": "Log", "data-empty": "Nothing was written so far." });
  const tell = (error) => { said.textContent = error.message; };
  const wish = (verb, text, sure) => h("button", { type: "button", class: verb === "cancel" && "danger", onclick: async () => {
    if (sure && !confirm(`${text} ${name}?`)) return;
    said.textContent = "";
    await post(`jobs/${id}/${verb}`, { by: "dashboard" }).catch(tell);
  } }, text);
  const buttons = h("div", { class: "row" });
  const offer = (now) => buttons.replaceChildren(...(ENDED.includes(now.phase) ? [] : [
    now.held ? wish("release", "Release") : wish("hold", "Hold"), now.phase === "QUEUED" ? "" : wish("restart", "Restart", true), wish("cancel", "Cancel", true),
  ].filter(Boolean)), command(`jobsched describe ${id}`));
  offer(answer.job);
  const roleOf = (line) => `${line.role}/${line.index}${line.restart ? `+${line.restart}` : ""}`;
  const picked = h("select", { "aria-label": "Role", onchange: () => read() }, h("option", { value: "" }, "all roles"), Object.keys(answer.job.spec.roles).map((role) => h("option", {}, role)));
  let reading = new AbortController();
  function read() {
    reading.abort();
    reading = new AbortController();
    lines.replaceChildren();
    const both = AbortSignal.any([signal, reading.signal]);
    stream(`jobs/${id}/logs?follow=true&tail=500${picked.value ? `&role=${encodeURIComponent(picked.value)}` : ""}`, both, (line) => {
      const atEnd = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 4;
      lines.append(`${roleOf(line)} │ ${line.text}\n`);
      while (lines.childNodes.length > 2000) lines.firstChild.remove();
      if (atEnd) lines.scrollTop = lines.scrollHeight;
    }, (on) => on && lines.replaceChildren()).catch(tell);  // a log has no event ids: it begins anew
  }
  read();
  if (!ended) {
    let version = answer.job.version, later = why.verdict;
    stream(`progress?job=${id}`, signal, async (now) => {
      upper.replaceChildren(...liveFacts(now, later).flat(9).filter(Boolean));
      if (now.job.version === version) return;
      version = now.job.version;
      offer(now.job);
      const [why, events] = await Promise.all([get(`jobs/${id}/why`, signal), get(`jobs/${id}/events`, signal)]);
      later = why.verdict;
      upper.replaceChildren(...liveFacts(now, later).flat(9).filter(Boolean));
      story.textContent = why.story.join("\n");
      course.replaceChildren(...timeline(events, ENDED.includes(now.job.phase)));
    }).catch(tell);
  }
  return [
    h("h1", {}, name, " ", h("small", {}, id)),
    buttons, said, course, upper,
    h("h2", {}, "Story"), story,
    h("h2", {}, "Log"), h("div", { class: "row" }, picked, command(`jobsched logs -f ${id}`)), lines,
  ];
}

// GPUs of a node as squares, used ones first; which of them are free only the ledger knows.
function gpus(n) {
  let used = n.node.gpus.filter((gpu) => gpu.healthy).length - n.free_gpus;
  const squares = n.node.gpus.map((gpu) => {
    const kind = !gpu.healthy ? "sick" : used-- > 0 ? "used" : "free";
    return h("span", { class: `gpu ${kind}`, title: `${gpu.kind}, ${kind}` });
  });
  return [squares.length ? h("div", { class: "gpus", "aria-hidden": "true" }, squares) : "", h("small", {}, `${n.free_gpus} of ${n.node.gpus.length} free`)];
}

async function nodes(signal) {
  const all = await get("nodes", signal);
  const why = (n) => [n.node.message, n.cordon ? n.cordon.why : ""].filter(Boolean).join("; ");
  const state = (n) => (n.state === "ready" ? mark(true)
    : ["lost", "not ready"].includes(n.state) ? h("span", { class: "pill bad", title: why(n) }, `✖ ${n.node.message || n.state}`)
    : h("span", { class: "pill QUEUED", title: why(n) }, `◑ ${n.state}`));
  return [
    h("h1", {}, "Nodes"),
    table(["Node", "State", "GPUs", "Kind", "CPUs free", "Memory free", "Jobs"], all.map((n) => [
      n.node.name, state(n), gpus(n), [...new Set(n.node.gpus.map((gpu) => gpu.kind))].join(", "),
      `${n.free.cpu_milli / 1000} of ${n.node.cpu_milli / 1000}`, `${gib(n.free.memory_bytes)} of ${gib(n.node.memory_bytes)}`,
      n.jobs.map((id, place) => [place ? ", " : "", h("a", { href: `#/job/${id}` }, id.slice(-6))]).flat(),
    ]), "No node has been seen."),
    h("div", { class: "row" }, command("jobsched nodes")),
  ];
}

async function queues(signal) {
  const all = await get("queues", signal);
  return [
    h("h1", {}, "Queues"),
    table(["Queue", "State", "Waiting", "Active", "GPUs in use", "Limit", "Weight", "Quota", "Borrowed", "Lent"], all.map((q) => [
      "\u2003".repeat(q.depth) + q.queue.name,
      q.is_cohort ? "cohort" : q.queue.paused ? "paused" : q.queue.draining ? "draining" : "open",
      String(q.waiting), String(q.active), String(q.gpus_in_use),
      q.queue.max_gpus === null ? "none" : String(q.queue.max_gpus), String(q.queue.weight),
      ...["quota", "borrowed", "lent"].map((what) => q.holdings.map((x) => `${x.resource} ${x[what]}`).join(", ") || "none"),
    ]), "No queues."),
    h("div", { class: "row" }, command("jobsched queues")),
  ];
}

const checkTable = (checks) => table(["Check", "State", "Found", "What helps"], checks.map((c) => [c.name, mark(c.ok), c.message, c.hint]), "");
const doctor = async (signal) => [h("h1", {}, "Doctor"), checkTable(await get("doctor", signal)), h("div", { class: "row" }, command("jobsched doctor"))];

// ---- routing and liveness ----

const PAGES = { overview, jobs, nodes, queues, doctor, job };
const LIVE = new Set(["overview", "jobs", "nodes", "queues"]);
let page = new AbortController(), following = new AbortController(), shown = "", due = 0;

async function show() {
  const [, name = "overview", ref = ""] = location.hash.split("/");
  const build = PAGES[name] ?? overview, moved = shown !== location.hash;
  page.abort();
  page = new AbortController();
  const { signal } = page;
  try {
    const content = await build(signal, ref);
    if (signal.aborted) return;
    const focused = document.activeElement?.id, caret = document.activeElement?.selectionStart;
    $("main").replaceChildren(...content.flat(9).filter(Boolean));
    shown = location.hash;
    document.title = `${ref ? $("main").querySelector("h1").firstChild.textContent : name} – jobsched`;
    if (moved) { $("main").focus({ preventScroll: true }); scrollTo(0, 0); }
    else if (focused && focused !== "main") { $(focused)?.focus(); if (caret != null) $(focused)?.setSelectionRange?.(caret, caret); }
  } catch (error) {
    if (!signal.aborted) $("main").replaceChildren(h("p", { class: "error", role: "alert" }, error.message));
  }
  for (const link of document.querySelectorAll("nav a")) link.hash === `#/${name}` ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
}

function follow() {
  following.abort();
  following = new AbortController();
  stream("events", following.signal, () => {
    if (due || !LIVE.has(location.hash.split("/")[1] ?? "overview")) return;
    due = setTimeout(() => { due = 0; show(); }, 500);
  }, (on) => {
    $("live").textContent = on ? "● live" : "○ paused";
    $("live").classList.toggle("off", !on);
  }).catch(() => {});  // refused: the log-in dialog is open, or the page says why
}

let went = false;
addEventListener("keydown", (event) => {
  if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const to = { o: "overview", j: "jobs", n: "nodes", q: "queues", d: "doctor" }[event.key];
  if (went && to) location.hash = `#/${to}`;
  else if (event.key === "?") $("help").showModal();
  else if (event.key === "/" && $("filter")) { event.preventDefault(); $("filter").focus(); }
  went = event.key === "g";
});
$("help-button").addEventListener("click", () => $("help").showModal());
addEventListener("hashchange", show);
follow();
show();
