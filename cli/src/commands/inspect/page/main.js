// The page as a whole: data in, tabs, theme, keys.

const TABS = ['graph', 'passes', 'memory', 'kernels', 'profile'];

class App {
  constructor() {
    this.all = [];
    this.palette = palette();
    const panel = (n) => $(`#panel-${n}`);
    this.views = { graph: new GraphView(panel('graph'), this), passes: new PassesView(panel('passes'), this), memory: new MemoryView(panel('memory'), this),
      kernels: new KernelsView(panel('kernels'), this), profile: new ProfileView(panel('profile'), this) };
    for (const t of TABS) $(`#tab-${t}`).addEventListener('click', () => this.go(t));
    $('#theme').addEventListener('click', () => this.theme());
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.recolour());
    document.addEventListener('keydown', (e) => this.key(e));
    this.filled = new Set();
  }

  async start() {
    for (const s of document.querySelectorAll('script.payload')) this.all.push(new Data(await unpack(s.textContent)));
    this.pages = $('#page-pick');
    this.fillPages();
    this.pages.addEventListener('change', () => this.setData(this.all[Number(this.pages.value)]));
    this.setData(this.all[0]);
    const wanted = location.hash.slice(1);
    this.go(TABS.includes(wanted) ? wanted : this.all[0].graphs.length > 1 ? 'graph' : 'memory');
    document.body.dataset.ready = 'yes';
  }

  fillPages() {
    clear(this.pages).append(...this.all.map((d, i) => el('option', { value: i, text: d.title })));
    this.pages.hidden = this.all.length < 2;
    $('#title').textContent = this.all.length < 2 ? this.all[0].title : '';
  }

  /** The first plan of another page. */
  async add(text) {
    const m = /<script type="application\/octet-stream" class="payload">([^<]*)<\/script>/.exec(text);
    if (!m) throw new Error('this is no page of pleach inspect');
    const d = new Data(await unpack(m[1]));
    this.all.push(d);
    this.fillPages();
    this.pages.value = String(this.all.indexOf(this.data));
    return d;
  }

  setData(data) {
    this.data = data;
    $('#facts').textContent = [data.plan.arch, data.raw.dtype, data.plan.meta.layers ? `${data.plan.meta.layers} layers` : '', data.raw.merge ? 'merged' : '', `pleach ${data.raw.program}`].filter(Boolean).join(' · ');
    this.filled.clear();
    if (this.tab) this.fill(this.tab);
  }

  /** A tab is filled when it is first seen: some need their size. */
  fill(tab) {
    if (this.filled.has(tab)) return;
    this.filled.add(tab);
    this.views[tab].setData(this.data);
  }

  go(tab) {
    this.tab = tab;
    tip.hide();
    for (const t of TABS) {
      $(`#tab-${t}`).setAttribute('aria-selected', String(t === tab));
      $(`#tab-${t}`).tabIndex = t === tab ? 0 : -1;
      $(`#panel-${t}`).hidden = t !== tab;
    }
    this.fill(tab);
    history.replaceState(null, '', `#${tab}`);
  }

  goRule(name) { this.go('passes'); this.views.passes.goRule(name); }

  goKernel(i) {
    this.go('kernels');
    this.views.kernels.pick(i);
    this.views.kernels.rows.querySelector(`[data-kernel="${i}"]`)?.scrollIntoView({ block: 'center' });
  }

  theme() {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    document.documentElement.dataset.theme = dark ? 'light' : 'dark';
    this.recolour();
  }

  recolour() {
    this.palette = palette();
    if (this.views.graph.scene) { this.views.graph.showLegend(); this.views.graph.draw(); }
    (this.views.memory.arenas || []).forEach((a) => a.draw());
    if (this.views.profile.list) this.views.profile.paint();
  }

  key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) return;
    if (e.key === '/') { e.preventDefault(); this.go('graph'); this.views.graph.query.focus(); return; }
    const k = Number(e.key);
    if (k >= 1 && k <= TABS.length) { this.go(TABS[k - 1]); return; }
    if (e.target.getAttribute('role') === 'tab' && (e.key === 'ArrowLeft' || e.key === 'ArrowRight')) {
      const next = TABS[(TABS.indexOf(this.tab) + (e.key === 'ArrowRight' ? 1 : TABS.length - 1)) % TABS.length];
      this.go(next);
      $(`#tab-${next}`).focus();
    }
  }

  fault(message) {
    const f = $('#fault');
    f.textContent = message;
    f.hidden = false;
  }
}

const app = new App();
window.pleach = app;
app.start().catch((e) => { app.fault(`The data of this page cannot be shown: ${e.message}`); throw e; });
