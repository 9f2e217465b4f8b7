// How the server is asked, by the page and by its worker: as often as it is busy or away.

const AWAY = [429, 502, 503, 504]; // the middle ones are a proxy's

/**
 * A reply that is good.
 *
 * Throws an Error with the reply's `status` where the server refuses, and its reason.
 */
export async function ask(url, { signal, token, waiting = () => {} } = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  for (;;) {
    const reply = await fetch(url, { signal, headers }).catch((error) => {
      if (error.name === "AbortError") throw error;
      return null; // nobody answers
    });
    if (reply?.ok) return reply;
    if (reply && !AWAY.includes(reply.status)) {
      const problem = await reply.json().catch(() => ({ detail: `${reply.status} ${reply.statusText}` }));
      throw Object.assign(new Error(problem.detail ?? `${reply.status} ${reply.statusText}`), { status: reply.status });
    }
    waiting(reply ? "the server is busy; asking again" : "the server does not answer; asking again");
    const seconds = Number(reply?.headers.get("Retry-After")) || 1; // a proxy may name a date
    await pause(seconds, signal);
    signal?.throwIfAborted();
  }
}

/** Some seconds, or as long as nobody gives up. */
async function pause(seconds, signal) {
  if (signal?.aborted) return;
  await new Promise((done) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      done();
    };
    const timer = setTimeout(end, 1000 * seconds);
    signal?.addEventListener("abort", end);
  });
}
