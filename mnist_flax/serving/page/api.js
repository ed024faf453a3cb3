// The server's API.

/** What the server answers; its own sentence as an Error where it refuses. */
export async function ask(path, body, type = "application/json") {
  const sent = body === undefined ? {} : { method: "POST", headers: { "Content-Type": type }, body };
  let response;
  try {
    response = await fetch(path, sent);
  } catch {
    throw new Error("The server does not answer: is it still running?");
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(content.error ?? `The server answered with status ${response.status}.`);
  return content;
}
