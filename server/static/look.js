// The last part of the script: looks at the server once a second and has the other parts draw it.
// -- the loop -----------------------------------------------------------------------------------

let info = null, round = 0, last = null;

async function look() {
  info ??= await get("info");
  if (round++ % ADAPTERS_EVERY === 0) drawAdapters((await get("adapters")).adapters);
  const report = await get("requests");
  const finished = new Map(report.finished.map((record) => [record.request_id, record]));
  const running = report.running.map((record) => observe(record, report.block_size, true));
  const now = new Set(report.running.map((record) => record.request_id));
  const ended = [];
  for (const [id, history] of seen)
    if (history.running && !now.has(id))
      ended.push(observe(finished.get(id) ?? history.record, report.block_size, false));
  await Promise.all([...running.slice(-MAX_DRAWN), ...ended].map(askThoughts));
  drawFacts(info, report);
  drawRequests();
  drawFinished(report.finished);
  last = report;
  await lookAtKept(report);
}

async function loop() {
  for (;;) {
    if (document.visibilityState === "visible") {
      try {
        await look();
        document.querySelector("main").hidden = false;
        $("status").className = "soft";
        $("status").textContent = `as of ${new Date().toLocaleTimeString("en-GB")}`;
        $("forget").hidden = !sessionStorage.getItem(KEY);
      } catch (error) {
        info = null; // a server that comes back may be another
        round = 0;
        $("status").className = "soft bad";
        $("status").textContent = `${error instanceof HttpError ? error.message : "the server cannot be reached"}; trying again`;
        if (error.status === 401) await askForKey();
      }
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

$("forget").addEventListener("click", () => { sessionStorage.removeItem(KEY); location.reload(); });
loop();
