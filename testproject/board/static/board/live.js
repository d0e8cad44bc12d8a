// Keeps a page up to date: a topic by an event stream, a chat by a WebSocket, the numbers on the
// first page by a long poll. Each says what it has, so that after a break it misses nothing.
"use strict";

const page = document.body.dataset;

// How far this page has come in the changes of its topic.
let version = Number(page.version);

const backoff = {
  failures: 0,
  // 0.2 to 0.4 s at first, then up to 10 s: not all pages come back in the same instant.
  wait() {
    const longest = Math.min(10000, 400 * 2 ** this.failures++);
    return new Promise((resolve) => setTimeout(resolve, longest * (0.5 + Math.random() / 2)));
  },
  reset() { this.failures = 0; },
};

function show(state) {
  const place = document.getElementById("connection");
  place.hidden = false;
  place.dataset.state = state;
  place.textContent = state === "live" ? "live" : "reconnecting …";
}

function showTime(time) {
  const moment = new Date(time.dateTime);
  time.textContent = moment.toLocaleString([], { dateStyle: "long", timeStyle: "short" });
}

function change(event) {
  if (event.version <= version) return;
  version = event.version;
  const list = document.getElementById("messages");
  let article = document.getElementById(`message-${event.id}`);
  if (event.deleted) {
    article?.remove();
    return;
  }
  if (article === null) {
    article = document.getElementById("message").content.firstElementChild.cloneNode(true);
    article.id = `message-${event.id}`;
    list.append(article);
  }
  article.querySelector("time").dateTime = event.created;
  showTime(article.querySelector("time"));
  article.querySelector(".author").textContent = event.author;
  article.querySelector(".text").textContent = event.text;
  article.classList.add("new");
}

// The browser itself comes back when a stream ends, with the id of the last event; but it gives up
// when it is refused, as by a worker that is about to leave.
function followEvents() {
  const source = new EventSource(`${page.events}?after=${version}`);
  source.onopen = () => { backoff.reset(); show("live"); };
  source.onmessage = (message) => change(JSON.parse(message.data));
  source.onerror = () => {
    show("away");
    if (source.readyState === EventSource.CLOSED) backoff.wait().then(followEvents);
  };
  addEventListener("pagehide", () => source.close(), { once: true });
}

// What was said and has not come back yet, by its key: sent again after a break, and saved once.
const unconfirmed = new Map();
let socket = null;

function showNewest() {
  scrollTo({ top: document.body.scrollHeight });
}

function followChat() {
  const url = new URL(page.chat, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  url.searchParams.set("after", version);
  socket = new WebSocket(url);
  socket.onopen = () => {
    backoff.reset();
    show("live");
    for (const text of unconfirmed.values()) socket.send(text);
  };
  socket.onmessage = (message) => {
    const event = JSON.parse(message.data);
    unconfirmed.delete(event.key);
    if (event.error) document.querySelector(".problem").textContent = event.error;
    else change(event);
    showNewest();
  };
  socket.onclose = () => {
    show("away");
    backoff.wait().then(followChat);
  };
}

function say(submitted) {
  submitted.preventDefault();
  const field = submitted.target.elements.text;
  // randomUUID() is there on secure pages only.
  const key = [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const dashed = key.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
  unconfirmed.set(dashed, JSON.stringify({ key: dashed, text: field.value }));
  if (socket.readyState === WebSocket.OPEN) socket.send(unconfirmed.get(dashed));
  document.querySelector(".problem").textContent = "";
  field.value = "";
}

async function followCounts() {
  let seen = "";
  for (;;) {
    try {
      const answer = await fetch(`${page.counts}?${new URLSearchParams({ seen })}`);
      if (!answer.ok) throw new Error(answer.status);
      const found = await answer.json();
      seen = found.seen;
      for (const [topic, number] of Object.entries(found.topics)) {
        const place = document.querySelector(`[data-topic="${topic}"]`);
        if (place) place.textContent = number;
      }
      backoff.reset();
      show("live");
    } catch {
      show("away");
      await backoff.wait();
    }
  }
}

document.querySelectorAll("article time").forEach(showTime);
if (page.events) followEvents();
if (page.chat) {
  showNewest();
  followChat();
  document.getElementById("say").addEventListener("submit", say);
}
if (page.counts) followCounts();
