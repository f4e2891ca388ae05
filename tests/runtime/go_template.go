// Renders Go templates as Ollama does: the same options, and the same map of values.
// Reads [{template, values}, …] as JSON from standard input, writes the texts as a JSON list.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type job struct {
	Template string         `json:"template"`
	Values   map[string]any `json:"values"`
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, j := range jobs {
		parsed, err := template.New("").Option("missingkey=zero").Parse(j.Template)
		if err != nil {
			panic(err)
		}
		var out bytes.Buffer
		if err := parsed.Execute(&out, j.Values); err != nil {
			panic(err)
		}
		texts = append(texts, out.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		panic(err)
	}
}
